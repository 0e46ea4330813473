"""The one table of tolerances: (dtype, what is compared) -> largest relative deviation that arithmetic explains.

Deviations are max |actual - expected| / max |expected|. float64 rounds at 1.1e-16, float32 at 6e-8, bfloat16 at 4e-3; a
recurrence over some hundred steps and a few matrix products multiply that by 10 to 1000.
"""

TOLERANCE: dict[tuple[str, str], float] = {
    ("float64", "law"): 1e-9,  # whole mixers, at strong gates, gradients included
    ("float64", "derivative"): 1e-5,  # central differences: rounding, 1e-15 of the loss, over steps of 1e-5
    ("float64", "op"): 1e-10,  # a form of an op against its definition
    ("float32", "op"): 5e-6,  # an fp32 form against the float64 definition
    ("float32", "gradient"): 2e-5,  # its gradients
    ("float32", "law"): 1e-4,  # whole mixers: projections, norms and division on top of the op
    ("bfloat16", "law"): 6e-2,  # whole mixers in bf16: a dozen roundings of 4e-3 in a row
}
