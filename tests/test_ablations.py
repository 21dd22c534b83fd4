"""The networks of the paper's ablations: what each has, its shapes; they are folded and exported like others."""

import numpy as np
import pytest
import torch

from nextvit import create_model, export, fold
from nextvit.ablations import ABLATIONS, Ablation
from nextvit.backbone import EMHSA, MHCA, NTB, NextViT, Stacked
from nextvit.compared import KINDS, Compared
from nextvit.create import list_models
from nextvit.errors import UserError
from nextvit.runtime.open import open_session
from nextvit.spec import plan
from tests.conftest import fill, relative_error

NAMES = [a.variant.name for a in ABLATIONS]
OTHERS = [a for a in ABLATIONS if a.table == "table7" and a.row != "NCB (ours)"]
PRINTED = {  # of the tables, a figure a row
    "table1": {"CCCC": 44.1, "CCCT": 44.7, "CCTT": 44.0, "CTTT": 42.6, "CCCH_N": 44.6, "CCH_NH_N": 45.2,
               "CH_NH_NH_N": 45.5, "H_NH_NH_NH_N": 44.5},
    "table7": {"BottleNeck Block": 44.5, "ConvNeXt Block": 41.4, "LSA Block": 38.7, "PoolFormer Block": 42.3,
               "Local MHRA Block": 42.4, "NCB (ours)": 45.8},
    "table8": {"r = 0": 43.1, "r = 0.25": 45.0, "r = 0.5": 45.4, "r = 0.75": 45.8, "r = 1": 45.4},
}  # fmt: skip


def on_meta(ablation: Ablation, **how) -> NextViT:
    with torch.device("meta"):
        return NextViT(ablation.variant, kinds=KINDS, **how).eval()


def test_names_are_their_own_and_not_among_the_variants():
    assert len(set(NAMES)) == len(NAMES) == 32
    assert not set(NAMES) & set(list_models())


@pytest.mark.parametrize(
    "name", ["table7_nothing", "table1_ccct@0,0", "table1_ccct@5,-3", "table1_ccct@5", "table8_r100@5,0"]
)
def test_what_is_no_row_or_depth_is_no_model(name):
    with pytest.raises(UserError, match=f"there is no model '{name}'"):
        create_model(name)


def test_other_depths_have_a_name_that_makes_them_again():
    ablation = next(a for a in ABLATIONS if a.variant.name == "table1_ccct")
    other = ablation.at(5, -1)
    assert other.name == "table1_ccct@5,-1"
    with torch.device("meta"):
        model = create_model(other.name)
    assert model.metadata.variant == other.name
    assert model.variant.depths == other.depths == (3, 2, 5, 2)
    assert ablation.at(*ablation.depths).name == "table1_ccct@13,0"  # the usual depths may become others
    assert ablation.at(*ablation.depths).stages == ablation.variant.stages


@pytest.mark.parametrize("table", PRINTED)
def test_rows_are_the_papers_with_its_figures(table):
    assert {a.row: a.printed["det_box_ap"] for a in ABLATIONS if a.table == table} == PRINTED[table]


@pytest.mark.parametrize("name", ["table2_n4", "table7_ncb", "table8_r075", "table9_batch_relu"])
def test_the_row_that_is_next_vit_s_is_it(name):
    with torch.device("meta"):
        small, same = create_model("nextvit_small").state_dict(), create_model(name).state_dict()
    assert {key: value.shape for key, value in small.items()} == {key: value.shape for key, value in same.items()}


@pytest.mark.parametrize("name", ["table2_n4_base", "table2_n4_large"])
def test_base_and_large_are_rows_of_table_2(name):
    with torch.device("meta"):
        published, same = create_model(name.replace("table2_n4", "nextvit")), create_model(name)
    assert sum(p.numel() for p in published.parameters()) == sum(p.numel() for p in same.parameters())


@pytest.mark.parametrize("ablation", ABLATIONS, ids=NAMES)
def test_four_maps_and_logits_of_any_size(ablation):
    height, width = 224, 320
    x = torch.empty(1, 3, height, width, device="meta")
    maps = on_meta(ablation, features_only=True)(x)
    expected = [(1, c, height // s, width // s) for c, s in zip(ablation.variant.widths, (4, 8, 16, 32), strict=True)]
    assert [tuple(m.shape) for m in maps] == expected
    assert on_meta(ablation)(x).shape == (1, 1000)


@pytest.mark.parametrize("ablation", [a for a in ABLATIONS if a.table == "table1"], ids=lambda a: a.row)
def test_stages_have_the_blocks_that_their_letters_say(ablation):
    letters = ablation.row.replace("_N", "")
    wanted = {"C": {"ncb"}, "T": {"ntb"}, "H": {"ncb", "ntb"}}
    for letter, blocks in zip(letters, plan(ablation.variant), strict=True):
        assert {b.kind for b in blocks} == wanted[letter]
        if letter == "H":
            assert [b.kind for b in blocks].count("ntb") == 1
            assert blocks[-1].kind == "ntb"


@pytest.mark.parametrize("total", [5, 6, 8, 11])
@pytest.mark.parametrize("ablation", [a for a in ABLATIONS if a.table in ("table2", "table7")], ids=lambda a: a.row)
def test_depth_is_what_is_asked_for(ablation, total):
    third, second = plan(ablation.make(total, 1))[2], plan(ablation.make(total, 1))[1]
    assert sum(b.kind != "ntb" for b in third) == total
    assert third[-1].kind == "ntb"
    assert [b.kind == "ntb" for b in second] == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("name", "attention", "convolution"), [("table8_r000", 0, 256), ("table8_r025", 64, 192), ("table8_r100", 256, 0)]
)
def test_r_divides_an_ntb_between_its_branches(name, attention, convolution):
    with torch.device("meta"):
        block = create_model(name).stages[1].blocks[-1]
    assert isinstance(block, NTB)
    assert (block.e_mhsa.q.in_features if block.e_mhsa else 0) == attention
    assert (block.mhca.projection.in_channels if block.mhca else 0) == convolution
    assert any(isinstance(m, EMHSA) for m in block.modules()) == bool(attention)
    assert any(isinstance(m, MHCA) for m in block.modules()) == bool(convolution)


@pytest.mark.parametrize(
    "name", ["table8_r000", "table8_r100", "table9_layer_gelu", *(a.at(1, 0).name for a in OTHERS)]
)
def test_folding_changes_nothing_and_gradients_reach_all(name):
    torch.manual_seed(0)
    model = fill(create_model(name, num_classes=4))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert relative_error(fold(model)(x), model(x)) < 2e-5
    model.train()(x).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(
    "name",
    [
        "nextvit_nano@1,1,2x1,1,r1",  # attention alone, in few blocks
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("table8_r000", "table8_r100", "table9_layer_gelu")),
        *(pytest.param(a.variant.name, marks=pytest.mark.slow) for a in OTHERS),
    ],
)
def test_a_file_of_it_answers_as_it_does(name, tmp_path):
    model = fill(create_model(name, num_classes=4))
    export(model, tmp_path / "m.onnx", image_size=64, dynamic=False)
    images = np.random.default_rng(0).standard_normal((4, 3, 64, 64), np.float32)
    session = open_session(tmp_path / "m.onnx", device="cpu", threads=1)
    found = torch.from_numpy(np.concatenate([session(image[None]) for image in images]))
    with torch.no_grad():
        assert relative_error(found, model(torch.from_numpy(images))) < 1e-3


@pytest.mark.parametrize("ablation", OTHERS, ids=lambda a: a.row)
def test_another_block_stands_where_ncb_does(ablation):
    with torch.device("meta"):
        blocks = [m for m in create_model(ablation.variant.name).modules() if isinstance(m, Stacked)]
    assert [isinstance(b, Compared) for b in blocks].count(True) == 3 + 3 + ablation.depths[0] + ablation.depths[1] + 2
    assert all(isinstance(b, Compared | NTB) for b in blocks)
