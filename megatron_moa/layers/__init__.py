"""The mixture as modules of Megatron; ../layer_specs.py puts them into layer specs.

Start with mlp.py (the dense feed-forward layer), then coefficients.py (gates and LA coefficients, their parallelism)
and experts.py (routed and shared experts). Beside them: grouped_linear.py and norm_and_attention.py, in plain PyTorch
what Megatron has from Transformer Engine and Apex; init_scale.py, the scale at step 0; layer_pattern.py, which layers
are MoE layers.
"""
