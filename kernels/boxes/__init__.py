"""IoU of boxes, and the encoding of boxes as offsets from anchors."""
