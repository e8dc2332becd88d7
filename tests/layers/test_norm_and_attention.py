"""TorchAttention against Megatron's DotProductAttention, TorchNorm against the formulas in fp32."""

import math

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moa.errors import UserError
from megatron_moa.layers.norm_and_attention import TorchAttention, TorchLayerNorm, TorchNorm, TorchRMSNorm

# Against the same-dtype stock module: fp32 differs by the order of sums, bf16 by the stock module's rounded scores
# (8 bits of mantissa, values of order 1).
TOLERANCES = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 3e-2, "rtol": 3e-2},
}


@pytest.fixture(scope="module")
def one_process(megatron):
    """Megatron's process groups for a single rank, and its streams of random numbers at their start."""
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def config_of(**fields) -> TransformerConfig:
    defaults = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "attention_dropout": 0.0,
        "masked_softmax_fusion": False,
        "attention_softmax_in_fp32": True,
    }
    return TransformerConfig(**{**defaults, **fields})


def make(cls, config, layer_number=1, mask_type=AttnMaskType.causal, **kwargs):
    return cls(config, layer_number, mask_type, "self", **kwargs)


def inputs_of(dtype, queries=11, keys=11, heads=4, groups=4, key_size=8, value_size=8, batch=3):
    generator = torch.Generator().manual_seed(0)
    shapes = (queries, batch, heads, key_size), (keys, batch, groups, key_size), (keys, batch, groups, value_size)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def output_and_gradients(module, inputs, mask=None):
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = module(*inputs, mask)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


def padding_mask(queries=11, keys=11, batch=3):
    """True where attention is forbidden: causal, and the last keys of each sequence are padding."""
    mask = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1).expand(batch, 1, -1, -1).clone()
    for sequence in range(batch):
        mask[sequence, :, :, keys - sequence :] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("mask", [None, padding_mask(), padding_mask(batch=1)], ids=["none", "padding", "shared"])
@pytest.mark.parametrize("scaling", [False, True])
def test_attention_equals_megatrons(one_process, dtype, groups, mask, scaling):
    config = config_of(
        num_query_groups=groups, bf16=dtype == torch.bfloat16, params_dtype=dtype, apply_query_key_layer_scaling=scaling
    )
    inputs = inputs_of(dtype, groups=groups)
    ours = output_and_gradients(make(TorchAttention, config, layer_number=2), inputs, mask)
    stock = output_and_gradients(make(DotProductAttention, config, layer_number=2), inputs, mask)
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, **TOLERANCES[dtype])


@pytest.mark.parametrize("mask_type", [AttnMaskType.no_mask, AttnMaskType.padding])
def test_attention_without_a_mask_sees_all(one_process, mask_type):
    config, inputs = config_of(), inputs_of(torch.float32, queries=5, keys=9)
    ours = output_and_gradients(make(TorchAttention, config, mask_type=mask_type, softmax_scale=0.3), inputs)
    stock = output_and_gradients(make(DotProductAttention, config, mask_type=mask_type, softmax_scale=0.3), inputs)
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCES[torch.float32])


def test_the_call_overrides_the_mask_type(one_process):
    inputs = inputs_of(torch.float32)
    causal, full = (make(TorchAttention, config_of(), mask_type=t) for t in (AttnMaskType.causal, AttnMaskType.no_mask))
    assert torch.equal(causal(*inputs, None, attn_mask_type=AttnMaskType.no_mask), full(*inputs, None))
    assert not torch.equal(causal(*inputs, None), full(*inputs, None))


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("groups", [4, 2])
def test_decoding_with_a_cache_continues_the_sequence(one_process, queries, groups):
    attention = make(TorchAttention, config_of(num_query_groups=groups))
    query, key, value = inputs_of(torch.float32, groups=groups)
    whole = attention(query, key, value, None)
    torch.testing.assert_close(attention(query[-queries:], key, value, None), whole[-queries:])


def test_more_queries_than_keys_is_refused(one_process):
    with pytest.raises(ValueError, match="leaves queries without any key"):
        make(TorchAttention, config_of())(*inputs_of(torch.float32, queries=5, keys=4), None)


@pytest.mark.parametrize(("key_size", "value_size"), [(12, 8), (8, 12)])
def test_values_of_another_size(one_process, key_size, value_size):
    query, key, value = inputs_of(torch.float32, key_size=key_size, value_size=value_size)
    attention = make(TorchAttention, config_of(), k_channels=key_size, v_channels=value_size)
    output = attention(query, key, value, None)
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) / math.sqrt(key_size)
    scores = scores.masked_fill(torch.ones(11, 11, dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.einsum("bnqk,kbnd->qbnd", scores.softmax(-1), value)
    torch.testing.assert_close(output, expected.reshape(11, 3, 4 * value_size))


def test_a_query_with_every_key_forbidden_gets_zeros(one_process):
    mask = padding_mask()
    mask[0, :, 3] = True
    output = make(TorchAttention, config_of())(*inputs_of(torch.float32), mask)
    assert output[3, 0].abs().max() == 0
    assert output.isfinite().all()


def test_dropout_draws_from_the_stream_of_this_rank(one_process):
    inputs = inputs_of(torch.float32)
    without = make(TorchAttention, config_of())(*inputs, None)

    def with_dropout(**fields):
        """The output, and whether the stream that all tensor-parallel ranks share was drawn from."""
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        shared = torch.cuda.get_rng_state()
        output = make(TorchAttention, config_of(attention_dropout=0.5, **fields))(*inputs, None)
        return output, not torch.equal(torch.cuda.get_rng_state(), shared)

    output, shared_stream = with_dropout()
    assert not shared_stream
    assert not torch.equal(output, without)
    assert torch.equal(output, with_dropout()[0])
    assert with_dropout(sequence_parallel=True, tensor_model_parallel_size=2)[1]
    assert torch.equal(make(TorchAttention, config_of(attention_dropout=0.5)).eval()(*inputs, None), without)


def test_memory_does_not_grow_with_the_square_of_the_sequence(one_process):
    from torch.profiler import ProfilerActivity, profile

    attention = make(TorchAttention, config_of(num_query_groups=2))
    inputs = inputs_of(torch.float32, queries=2048, keys=2048, groups=2, batch=1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        attention(*inputs, None).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert largest < 2048 * 2048 * 4  # one head's scores


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"window_size": (4, 0)}, "--window-size"),
        ({"softmax_type": "off-by-one"}, "--softmax-type off-by-one"),
        ({"context_parallel_size": 2}, "--context-parallel-size 2"),
        ({"qk_clip": True}, "--qk-clip"),
        ({"log_max_attention_logit": True}, "--log-max-attention-logit"),
    ],
)
def test_what_the_torch_function_cannot_do_is_refused(one_process, fields, flag):
    config = config_of()
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=flag):
        make(TorchAttention, config)


def test_biases_and_packed_sequences_are_refused(one_process):
    attention, inputs = make(TorchAttention, config_of()), inputs_of(torch.float32)
    with pytest.raises(UserError, match="attention bias"):
        attention(*inputs, None, attention_bias=torch.zeros(1))
    with pytest.raises(UserError, match="packed sequences"):
        attention(*inputs, None, packed_seq_params=object())


def test_attention_keeps_nothing(one_process):
    attention = make(TorchAttention, config_of(), pg_collection=ProcessGroupCollection.use_mpu_process_groups(["tp"]))
    assert not attention.state_dict()
    assert not attention.sharded_state_dict()


def norm_in_fp32(x, weight, bias, eps):
    x, weight = x.float(), weight.float()
    if bias is None:
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight + bias.float()


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize(
    ("input_dtype", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_norms_compute_in_fp32(kind, input_dtype, dtype):
    norm = TorchNorm(config_of(normalization=kind, params_dtype=dtype), 64, eps=1e-3)
    assert type(norm) is {"LayerNorm": TorchLayerNorm, "RMSNorm": TorchRMSNorm}[kind]
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.data.copy_(torch.randn(64, generator=generator))
    x = (torch.randn(5, 3, 64, generator=generator) * 3 + 1).to(input_dtype).requires_grad_()
    leaves = [x, *norm.parameters()]
    output, expected = norm(x), norm_in_fp32(x, norm.weight, getattr(norm, "bias", None), 1e-3)
    assert output.dtype == dtype
    # One rounding of the fp32 result, two at most where the kernel's order of sums falls on the other side.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(output.float(), expected, rtol=2 * unit, atol=2 * unit)
    weights = torch.randn(output.shape, generator=generator)
    ours = torch.autograd.grad((output.float() * weights).sum(), leaves)
    theirs = torch.autograd.grad((expected * weights.to(dtype).float()).sum(), leaves)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=8 * unit, atol=32 * unit)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("kind", "names"), [("LayerNorm", ["weight", "bias"]), ("RMSNorm", ["weight"])])
def test_norm_parameters(kind, names, sequence_parallel):
    config = config_of(normalization=kind, params_dtype=torch.bfloat16)
    config.sequence_parallel = sequence_parallel
    norm = TorchNorm(config=config, hidden_size=16, eps=1e-6, persist_layer_norm=True)
    assert list(norm.state_dict()) == names
    for parameter in norm.parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.sequence_parallel is sequence_parallel
    assert norm.eps == 1e-6


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layernorm_zero_centered_gamma", True, "--apply-layernorm-1p"),
        ("memory_efficient_layer_norm", True, r"^TransformerConfig\(memory_efficient_layer_norm=True\): needs Apex; "),
        ("normalization", "GroupNorm", "--normalization GroupNorm is not known: say LayerNorm or RMSNorm"),
    ],
)
def test_norms_that_plain_torch_lacks_are_refused(field, value, message):
    config = config_of()
    setattr(config, field, value)
    with pytest.raises(UserError, match=message):
        TorchNorm(config, 16)
