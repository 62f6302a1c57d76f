"""The cases that the benchmark times. Importing this package registers them all."""

from ssdperf.cases import boxes, drop_in, nms, postprocess, training  # noqa: F401 - importing a module registers its cases

LEFT_OUT: dict[str, str] = {}  # names of the cases that this machine cannot run, and why
try:
    from ssdperf.cases import detector  # noqa: F401
except ModuleNotFoundError as error:  # the detector reads images and draws its dataset; the ops need neither
    LEFT_OUT = dict.fromkeys(("training step", "inference"), str(error))
