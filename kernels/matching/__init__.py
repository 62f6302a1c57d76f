"""Assignment of ground truths to anchors."""
