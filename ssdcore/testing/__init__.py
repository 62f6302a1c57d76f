"""Test any implementation of a detection op, not only this project's.

- `conformance`: one check per op of `ssdcore.kernels`. A check draws random problems, runs the given function on
  them and compares the results with the oracle. It raises AssertionError with a small problem that fails.
- `reference`: the oracles, which are the same ops in NumPy float64. They need only NumPy.
- `strategies`: Hypothesis strategies that generate the problems.
- `close`: how close floating-point results must be.

    from ssdcore.testing import conformance
    conformance.check_nms(my_nms)
    conformance.check_nms(my_nms, device="cuda", max_examples=1000)

`strategies` and `conformance` need Hypothesis: `pip install 'ssdcore[test]'`.
"""
