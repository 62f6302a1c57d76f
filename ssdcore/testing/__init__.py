"""What it takes to prove a detection op right: oracles, Hypothesis strategies, a tolerance policy, a conformance suite.

    from ssdcore.testing import conformance
    conformance.check_nms(my_nms)  # raises AssertionError with the smallest counterexample found

`reference` needs NumPy alone; `strategies` and `conformance` need Hypothesis (`pip install 'ssdcore[test]'`).
"""
