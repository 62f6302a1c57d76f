"""The postprocess: from the head's outputs to detections."""

import torch
from torch import Tensor

from ssdcore import kernels
from ssdperf import eager, inputs
from ssdperf.cases.peers import torchvision_ssd
from ssdperf.differences import same_detections
from ssdperf.registry import BATCHES, SSD_STAR, SSD_SWEEP, Shape, Workload, case, ssd, star, without
from ssdperf.ssd300 import BOX_WEIGHTS, IMAGE_SIZE

# score_threshold, iou_threshold, topk_candidates, max_detections: the defaults of the op and of torchvision's SSD.
SETTINGS = (0.01, 0.45, 400, 200)


def _shapes() -> list[Shape]:
    trained = [shape | {"outputs": "trained"} for shape in SSD_STAR]
    random = star(ssd(outputs="random"), B=BATCHES, dtype=("float32",))
    return without("G", shapes=trained + random)


@case(
    "postprocess",
    shapes=_shapes(),
    quick=without("G", shapes=[ssd(B=4, outputs="trained"), ssd(B=4, outputs="random")]),
    sweep=SSD_SWEEP,
)
def postprocess(device: str, dtype: torch.dtype, B: int, A: int, C: int, head: str, outputs: str) -> Workload:
    """Postprocess the outputs of a trained detector, with few candidates, or of one at random initialisation."""
    anchors = inputs.anchors(A, device)
    head_outputs = [inputs.as_head(packed, head) for packed in inputs.head_outputs(B, A, C, outputs, dtype, device)]
    arguments = [inputs.as_argument(x) for x in head_outputs]
    levels = [inputs.as_levels(x) for x in head_outputs]
    image_sizes = torch.full((B, 2), IMAGE_SIZE, device=device)
    model = torchvision_ssd()

    def by_torchvision() -> list[dict[str, Tensor]]:
        logits, deltas = (inputs.repacked(x).float() for x in head_outputs)
        raw = {"cls_logits": logits, "bbox_regression": deltas}
        return model.postprocess_detections(raw, [anchors] * B, [(IMAGE_SIZE, IMAGE_SIZE)] * B)

    return Workload(
        {
            "ssdcore": lambda: kernels.postprocess_detections(*arguments, anchors, image_sizes),
            "torchvision": by_torchvision,
            "eager": lambda: eager.postprocess_detections(*levels, anchors, image_sizes, BOX_WEIGHTS, *SETTINGS),
        },
        reads=head_outputs[0],  # and the deltas of the candidates, which after training are one anchor in a hundred
        difference=same_detections,
    )
