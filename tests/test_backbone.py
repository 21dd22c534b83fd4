"""The network is the published one: against the reference's check values, and against timm's own implementation."""

import numpy as np
import pytest
import timm
import torch

import nextvit
from nextvit.backbone import NextViT
from nextvit.cost import cost
from nextvit.errors import UserError
from nextvit.spec import VARIANTS, Stage, Variant, plan
from tests.conftest import fill, relative_error, uniform

PUBLISHED = ("nextvit_small", "nextvit_base", "nextvit_large")
SIZES = ((224, 224), (256, 320), (384, 384), (448, 672), (200, 232))
QUICK = (((224, 224), torch.float32), ((256, 320), torch.float32), ((200, 232), torch.float64))


def check_image(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(4 * uniform(100_000, 3 * height * width).reshape(1, 3, height, width))


def test_the_generator_of_the_check_values_is_the_reference_one():
    expected = [-0.4641623720526695, 0.1117741484194994, -0.4492304418236017, -0.2932558392640203]
    assert uniform(3, 4).tolist() == expected


@pytest.mark.parametrize(
    ("name", "first", "mean", "std", "argmax"),
    [
        ("nextvit_small", (-0.86813908, -0.66120476, 0.54627364, 0.35267326, 0.36552905), -0.01038847, 0.66543935, 69),
        pytest.param(
            "nextvit_base",
            (0.71651409, -0.83145678, -1.32366177, -0.63403964, -1.23442523),
            -0.00108579,
            1.27738050,
            650,
            marks=pytest.mark.slow,
        ),
        ("nextvit_large", (0.23628742, 2.23483148, 3.05150131, -0.72605157, 1.74119659), -0.06160893, 2.26277470, 704),
    ],
)
def test_logits_are_the_reference_ones(name, first, mean, std, argmax):
    model = fill(nextvit.create_model(name)).double()
    with torch.inference_mode():
        logits = model(check_image(224, 224))[0].numpy()
    np.testing.assert_allclose(logits[:5], first, atol=6e-9)
    assert (round(logits.mean(), 8), round(logits.std(), 8), logits.argmax()) == (mean, std, argmax)


def test_raw_stage_maps_are_the_reference_ones_at_an_odd_size():
    filled = fill(nextvit.create_model("nextvit_small"))
    model = nextvit.create_model("nextvit_small", features_only=True).double().eval()
    model.load_state_dict({k: v for k, v in filled.state_dict().items() if k in model.state_dict()})
    with torch.inference_mode():
        stem = model.stem(check_image(193, 161)).numpy()
        maps = [m.numpy() for m in model(check_image(193, 161))]
    assert stem.shape == (1, 64, 49, 41)
    assert round(stem.mean(), 8) == 0.05076234
    expected = [
        ((96, 49, 41), 0.01676027, 0.19241685, 0.23600587),
        ((256, 25, 21), 0.00135557, 0.28733447, 0.03489965),
        ((512, 13, 11), 0.00187755, 0.62634883, -0.21837677),
        ((1024, 7, 6), 0.00445965, 0.69810773, 1.53136750),
    ]
    found = [(m.shape[1:], round(m.mean(), 8), round(np.abs(m).mean(), 8), round(m[0, 0, 0, 0], 8)) for m in maps]
    assert found == expected


@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [
        pytest.param(n, s, d, marks=[] if n == "nextvit_small" and (s, d) in QUICK else pytest.mark.slow)
        for n in PUBLISHED
        for s in SIZES
        for d in (torch.float32, torch.float64)
    ],
)
def test_forward_equals_timm(name, size, dtype):
    ours = fill(nextvit.create_model(name))
    theirs = timm.create_model(name)
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.to(dtype), theirs.to(dtype).eval()
    images = torch.from_numpy(4 * uniform(7, 2 * 3 * size[0] * size[1]).reshape(2, 3, *size)).to(dtype)
    images[1] *= 0.5  # another contrast: over a large random image the logits vary little otherwise
    with torch.inference_mode():
        found, expected = ours(images), theirs(images)
    assert (expected[0] - expected[1]).abs().mean() > 1e-3, "the outputs must depend on the input"
    assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 1e-10)


def test_gradients_equal_timm_in_training_mode():
    ours = fill(nextvit.create_model("nextvit_small", drop_path_rate=0.0))
    theirs = timm.create_model("nextvit_small", drop_path_rate=0.0)
    theirs.load_state_dict(ours.state_dict())
    images = torch.from_numpy(uniform(5, 2 * 3 * 64 * 96).reshape(2, 3, 64, 96))
    grads = []
    for model in (ours.double().train(), theirs.double().train()):
        model(images).logsumexp(1).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in grads[1].items():
        torch.testing.assert_close(grads[0][name], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_parameters_and_operations_are_those_of_the_table(variant):
    with torch.device("meta"):
        counted = cost(nextvit.create_model(variant.name))
    assert counted.params == variant.params
    assert round(counted.gflops_paper, 2 if variant.name not in PUBLISHED else 1) == variant.gflops


@pytest.mark.parametrize(
    ("name", "size", "core", "paper"),
    [
        ("nextvit_small", 224, 5.794420, 5.810520),
        ("nextvit_base", 224, 8.273817, 8.293605),
        ("nextvit_large", 224, 10.753214, 10.776690),
        ("nextvit_small", 384, 17.215627, 17.262942),
        ("nextvit_base", 384, 24.586068, 24.644221),
        ("nextvit_large", 384, 31.956509, 32.025500),
    ],
)
def test_operations_equal_the_reference_counts(name, size, core, paper):
    with torch.device("meta"):
        counted = cost(nextvit.create_model(name), size)
    assert (round(counted.gflops, 6), round(counted.gflops_paper, 6)) == (core, paper)


@pytest.mark.parametrize("kv_pooling", ["sequence", "spatial"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 200)])
def test_any_size_from_32_works_and_every_parameter_gets_a_gradient(size, kv_pooling):
    model = nextvit.create_model("nextvit_nano", num_classes=7, in_channels=4, kv_pooling=kv_pooling).train()
    logits = model(torch.randn(2, 4, *size))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_a_smaller_image_is_refused_with_the_limit():
    with pytest.raises(UserError, match="31 x 64 pixels is too small; both sides need 32"):
        nextvit.create_model("nextvit_nano")(torch.randn(1, 3, 31, 64))


def test_spatial_pooling_is_true_average_pooling():
    pool = nextvit.create_model("nextvit_nano", kv_pooling="spatial").stages[1].blocks[-1].e_mhsa.pool
    reference = torch.nn.AvgPool2d(4, 4, ceil_mode=True, count_include_pad=False)
    for size in ((8, 8), (6, 5), (7, 13), (4, 9)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(pool(images), reference(images).flatten(2))


def test_drop_path_rises_linearly_and_splits_by_the_mixing_ratio():
    blocks = [b for stage in nextvit.create_model("nextvit_small").stages for b in stage.blocks]
    rates = [b.drop_path.rate for b in blocks]
    np.testing.assert_allclose(rates, 0.1 * np.arange(20) / 19)
    ntb = blocks[-1]
    assert ntb.drop_path_attention.rate == pytest.approx(0.075)
    assert ntb.drop_path_convolution.rate == pytest.approx(0.025)


def test_drop_path_drops_samples_and_keeps_the_mean():
    from nextvit.backbone import DropPath

    torch.manual_seed(0)
    out = DropPath(0.25).train()(torch.ones(4000, 2, 1, 1))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (out[:, 0] == out[:, 1]).all(), "a sample is dropped whole"
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.slow  # folded ones, and files of both kinds of pooling, are in test_folding and test_export
@pytest.mark.parametrize("kv_pooling", ["sequence", "spatial"])
@pytest.mark.parametrize("name", ["nextvit_nano", pytest.param("nextvit_small", marks=pytest.mark.slow)])
def test_torch_export_with_free_batch_height_and_width_gives_the_same_outputs(name, kv_pooling):
    model = fill(nextvit.create_model(name, kv_pooling=kv_pooling))
    batch, height, width = (torch.export.Dim(n, min=low, max=1024) for n, low in (("b", 1), ("h", 64), ("w", 64)))
    program = torch.export.export(
        model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=({0: batch, 2: height, 3: width},)
    ).module()
    for shape in ((1, 3, 64, 64), (3, 3, 75, 101), (2, 3, 224, 160)):
        images = torch.randn(shape)
        torch.testing.assert_close(program(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_torch_compile_takes_the_whole_graph():
    model = fill(nextvit.create_model("nextvit_nano", features_only=True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 64, 96)
    for found, expected in zip(compiled(images), model(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_torch_compile_with_inductor_gives_the_same_outputs():
    model = fill(nextvit.create_model("nextvit_nano"))
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), rtol=1e-4, atol=1e-4)


def test_attention_runs_through_the_fused_operator():
    model = nextvit.create_model("nextvit_nano").eval()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.inference_mode():
        model(torch.randn(1, 3, 64, 64))
    assert any("scaled_dot_product_flash_attention" in event.key for event in profile.key_averages())


def test_channels_last_and_autocast_work():
    model = fill(nextvit.create_model("nextvit_nano"))
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    for layout in (torch.contiguous_format, torch.channels_last):
        model = model.to(memory_format=layout)
        torch.testing.assert_close(model(images.to(memory_format=layout)), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images)
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_table_takes_other_patterns_ratios_norms_and_activations_as_rows():
    """What the paper's ablations (Tables 1, 2, 8, 9) vary is data: no block has a branch for it."""
    row = Variant(
        "ablation",
        (32, 16, 32, 32),
        (
            Stage((("ncb", 64, 1), ("ntb", 128, 1)), 1, 8),
            Stage((("ntb", 128, 2),), 1, 4),
            Stage((("ncb", 96, 2), ("ntb", 128, 1)), 2, 2),
            Stage((("ncb", 256, 2),), 1, 1),
        ),
        drop_path=0.1,
        params=0,
        gflops=0.0,
        mix=0.5,
        norm="layer",
        activation="gelu",
        expand={"ncb": 2, "ntb": 4},
    )
    assert [len(stage) for stage in plan(row)] == [2, 2, 6, 2]
    model = NextViT(row, num_classes=5).eval()
    images = torch.randn(2, 3, 64, 96)
    assert model(images).shape == (2, 5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d | torch.nn.ReLU) for m in model.modules())
    torch.testing.assert_close(nextvit.fold(model)(images), model(images), rtol=1e-5, atol=1e-6)


def test_a_width_without_room_for_both_branches_is_refused():
    from nextvit.spec import mixed_widths

    assert mixed_widths(1024, 0.75, 32) == (768, 256)
    with pytest.raises(UserError, match="width 96 with r = 0.75 leaves 0 channels"):
        mixed_widths(96, 0.75, 32)
