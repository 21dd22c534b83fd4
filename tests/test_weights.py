"""Weight files: every layout loads exactly, a file that does not fit is never half loaded, nothing in it runs."""

import argparse
import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import nextvit
from nextvit.create import open_checkpoint
from nextvit.errors import UserError
from nextvit.metadata import Metadata
from nextvit.spec import VARIANTS
from nextvit.weights import WeightsDoNotFit, load_into, read_weights, save_weights
from tests.conftest import fill, nextvit_here
from tests.conftest import nextvit as run


def official_names(state: dict[str, torch.Tensor], depths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The state dict as the released code names it."""
    renamed = {}
    for key, value in state.items():
        if match := re.match(r"stages\.(\d)\.blocks\.(\d+)\.(.*)", key):
            flat = sum(depths[: int(match[1])]) + int(match[2])
            key = f"features.{flat}.{match[3].replace('mlp.fc1', 'mlp.conv1').replace('mlp.fc2', 'mlp.conv2')}"
        renamed[key.replace("head.fc", "proj_head.0")] = value
    return renamed


def depths_of(name: str) -> tuple[int, ...]:
    return next(v.depths for v in VARIANTS if v.name == name)


@pytest.fixture(scope="module")
def small():
    return fill(nextvit.create_model("nextvit_small"))


@pytest.fixture
def nano_file(tmp_path):
    model = fill(nextvit.create_model("nextvit_nano", num_classes=3))
    path = tmp_path / "nano.safetensors"
    save_weights(path, model.state_dict(), Metadata("nextvit_nano", labels=("a", "b", "c"), num_classes=3))
    return path


@pytest.mark.parametrize("name", ["nextvit_small", "nextvit_base", "nextvit_large"])
def test_official_names_are_those_that_the_reference_lists(name):
    """The reference counts 472, 692 and 912 entries, and names them in this order."""
    names = list(official_names(nextvit.create_model(name).state_dict(), depths_of(name)))
    assert len(names) == {"nextvit_small": 472, "nextvit_base": 692, "nextvit_large": 912}[name]
    assert names[:2] == ["stem.0.conv.weight", "stem.0.norm.weight"]
    assert "features.6.e_mhsa.norm.running_var" in names
    assert f"features.{sum(depths_of(name)) - 1}.e_mhsa.norm.weight" not in names
    assert names[-2:] == ["proj_head.0.weight", "proj_head.0.bias"]


@pytest.mark.parametrize(
    "kind", ["official under model", "official bare", "timm pth", "timm safetensors", "own", "own ckpt"]
)
def test_every_layout_gives_the_same_network(kind, small, tmp_path):
    name = "nextvit_small" if kind == "timm pth" else "nextvit_nano"
    state = (small if name == "nextvit_small" else fill(nextvit.create_model(name))).state_dict()
    path = tmp_path / ("w.safetensors" if "safetensors" in kind or "own" in kind else "w.pth")
    if kind == "official under model":
        rest = {"optimizer": {"state": {}}, "epoch": 299, "args": argparse.Namespace(lr=2e-3, model="nextvit_small")}
        torch.save({"model": official_names(state, depths_of(name)), **rest}, path)
    elif kind == "official bare":
        torch.save(official_names(state, depths_of(name)), path)
    elif kind == "timm pth":
        theirs = timm.create_model("nextvit_small")
        theirs.load_state_dict(state)
        torch.save(theirs.state_dict(), path)
    elif kind == "timm safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    elif kind == "own":
        save_weights(path, state, Metadata(name))
    else:
        save_weights(path, {f"model.{k}": v for k, v in state.items()}, Metadata(name), {"epoch": 1})
    model = nextvit.create_model(name, weights=path)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(open_checkpoint(path).head.fc.weight, state["head.fc.weight"]), "the variant is told by the keys"


def test_our_files_load_in_timm(small, tmp_path):
    save_weights(tmp_path / "own.safetensors", small.state_dict(), small.metadata)
    theirs = timm.create_model("nextvit_small", checkpoint_path=str(tmp_path / "own.safetensors")).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(theirs(images), small(images), rtol=1e-5, atol=1e-5)


def test_features_only_takes_a_classifier_file(nano_file):
    model = nextvit.create_model("nextvit_nano", weights=nano_file, features_only=True).eval()
    assert [m.shape[1] for m in model(torch.randn(1, 3, 64, 64))] == [32, 128, 256, 512]


def test_another_class_count_gives_a_new_head_and_a_warning(nano_file):
    with pytest.warns(UserWarning, match="has 3 classes, 7 were asked for: the last layer is new"):
        model = nextvit.create_model("nextvit_nano", weights=nano_file, num_classes=7)
    assert model.head.fc.weight.shape == (7, 512)
    assert model.metadata.labels == ()
    assert torch.equal(model.norm.weight, read_weights(nano_file).tensors["norm.weight"])


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_input_channels_adapt_the_first_filter_so_that_grey_stays_grey(nano_file, channels):
    with pytest.warns(UserWarning, match="the first filter was adapted"):
        model = nextvit.create_model("nextvit_nano", weights=nano_file, in_channels=channels).eval()
    colour = nextvit.create_model("nextvit_nano", weights=nano_file).eval()
    filters = colour.stem[0].conv.weight
    assert model.stem[0].conv.weight.shape[1] == channels
    if channels == 1:
        grey = torch.randn(1, 1, 64, 64)
        torch.testing.assert_close(model(grey), colour(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(model.stem[0].conv.weight[:, 0], filters[:, 0] * 3 / channels)


@pytest.mark.fault("K7", "missing, unknown, misshapen entries: named, nothing loaded")
def test_all_that_does_not_fit_is_named_and_nothing_is_loaded(small):
    state = dict(small.state_dict())
    del state["norm.bias"]
    state["strange"] = torch.zeros(1)
    state["head.fc.bias"] = torch.zeros(999)
    model = nextvit.create_model("nextvit_small")
    before = model.norm.weight.clone()
    with pytest.raises(
        WeightsDoNotFit, match=r"1 missing \(norm.bias\).*1 unexpected \(strange\).*shape \(head.fc.bias\)"
    ) as e:
        load_into(model, state, "w.pth", "nextvit_small")
    assert (e.value.missing, e.value.unexpected, e.value.misshapen) == (["norm.bias"], ["strange"], ["head.fc.bias"])
    assert torch.equal(model.norm.weight, before)


@pytest.mark.fault("K7", "another variant: exit 2, both are named")
def test_weights_of_another_variant_are_refused_by_name(nano_file, small, tmp_path):
    with pytest.raises(UserError, match="holds nextvit_nano and nextvit_tiny was asked for"):
        nextvit.create_model("nextvit_tiny", weights=nano_file)
    torch.save(official_names(small.state_dict(), depths_of("nextvit_small")), tmp_path / "s.pth")
    with pytest.raises(WeightsDoNotFit, match="missing"):
        nextvit.create_model("nextvit_base", weights=tmp_path / "s.pth")


def test_weights_with_another_pooling_are_refused(tmp_path):
    model = nextvit.create_model("nextvit_nano", kv_pooling="spatial")
    save_weights(tmp_path / "w.safetensors", model.state_dict(), model.metadata)
    with pytest.raises(UserError, match="kv_pooling='spatial'"):
        nextvit.create_model("nextvit_nano", weights=tmp_path / "w.safetensors")
    assert open_checkpoint(tmp_path / "w.safetensors").metadata.kv_pooling == "spatial"


@pytest.mark.fault("K7", "weights that are not finite: refused")
def test_weights_that_are_not_finite_are_refused(nano_file, tmp_path):
    tensors = read_weights(nano_file).tensors
    tensors["norm.weight"][3] = float("nan")
    save_weights(tmp_path / "nan.safetensors", tensors, Metadata("nextvit_nano", num_classes=3))
    with pytest.raises(UserError, match="not finite in norm.weight"):
        nextvit.create_model("nextvit_nano", weights=tmp_path / "nan.safetensors")


@pytest.mark.parametrize(
    "wrong", [{"num_classes": "3"}, {"num_classes": 0}, {"in_channels": 1.5}, {"drop_path_rate": 1.0}]
)
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        nextvit.create_model("nextvit_nano", **wrong)


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(ValueError, match="did you mean nextvit_small"):
        nextvit.create_model("nextvit_smal")


# ---- hostile and damaged files ---------------------------------------------------------------------------------------


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def _hostile(path, marker, where):
    payload = Hostile(str(marker))
    if where == "top":
        torch.save(payload, path)
    elif where == "nested":
        torch.save({"model": {"stem.0.conv.weight": torch.zeros(1)}, "optimizer": {"state": [1, payload]}}, path)
    elif where == "args":
        torch.save({"model": {}, "args": argparse.Namespace(lr=payload)}, path)
    elif where == "legacy":
        torch.save({"model": payload}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(payload, protocol=2))


@pytest.mark.fault("K5", "hostile pickles: refused, nothing in them runs")
@pytest.mark.parametrize("where", ["top", "nested", "args", "legacy", "bare pickle"])
def test_a_hostile_pickle_is_refused_and_nothing_in_it_runs(where, tmp_path):
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    _hostile(path, marker, where)
    done = run("info", path) if where == "top" else nextvit_here("info", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*refused and nothing in it was run: it asks for `\w+.system`.*\n", done.stderr), (
        done.stderr
    )
    assert not marker.exists()


DAMAGE = [
    "garbage",
    "empty",
    "text",
    "cut pth",
    "cut legacy pth",
    "cut safetensors",
    "cut own",
    "missing",
    "a list",
    "folder",
]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_one_sentence(kind, nano_file, tmp_path):
    path = tmp_path / "w.pth"
    state = {"stem.0.conv.weight": torch.randn(32, 3, 3, 3), "stages.0.x": torch.randn(64)}
    if kind == "garbage":
        path.write_bytes(bytes(range(256)) * 40)
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("<html>404 not found</html>")
    elif kind == "cut pth":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "cut legacy pth":
        torch.save(state, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "cut safetensors":
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "cut own":
        path.write_bytes(nano_file.read_bytes()[:-1])
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        nextvit.create_model("nextvit_nano", weights=path)
    assert "\n" not in str(error.value)


@pytest.mark.fault("K4", "a flipped bit in our .safetensors: found each time")
def test_every_flipped_bit_of_our_files_is_found(nano_file):
    good = nano_file.read_bytes()
    header = int.from_bytes(good[:8], "little")
    places = [0, 8, 9, *range(10, header, header // 30), *range(header, len(good), len(good) // 20), len(good) - 1]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        nano_file.write_bytes(bad)
        with pytest.raises(UserError):
            nextvit.create_model("nextvit_nano", weights=nano_file)
    nano_file.write_bytes(good)
    nextvit.create_model("nextvit_nano", weights=nano_file)


@pytest.mark.fault("K4", "a flipped bit in a .pth: found")
def test_a_flipped_bit_in_a_pth_is_found(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"stem.0.conv.weight": torch.randn(4000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is not None
    with pytest.raises(UserError, match="damaged"):
        read_weights(path)


@pytest.mark.fault("K6", "mutated files: a sentence, or the right names and shapes")
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_3000_random_mutations_never_do_more_than_refuse(kind, tmp_path):
    """Bytes overwritten at random: a typed error, or the tensors as they were; never others, never another error."""
    rng = np.random.default_rng(0)
    tensors = {key: torch.randn(16, 8) for key in ("stem.0.conv.weight", "stages.0.blocks.0.norm.bias")}
    path = tmp_path / f"w.{kind}"
    if kind == "pth":
        torch.save({"model": tensors, "args": argparse.Namespace(lr=1)}, path)
    else:
        save_weights(path, tensors, Metadata("nextvit_nano"))
    good = path.read_bytes()
    refused = 0
    for _ in range(3000):
        bad = bytearray(good)
        for place in rng.integers(len(bad), size=rng.integers(1, 4)):
            bad[place] ^= rng.integers(1, 256)
        path.write_bytes(bad)
        try:
            found = read_weights(path).tensors
        except UserError:
            refused += 1
        else:
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert refused > 1500


# ---- published weights -----------------------------------------------------------------------------------------------


def test_published_tags_are_timms():
    from nextvit.weights import TAGS

    for name in ("nextvit_small", "nextvit_base", "nextvit_large"):
        known = timm.list_pretrained(f"{name}.*")
        assert {f"{name}.{tag}" for tag in TAGS.values()} == set(known)


@pytest.mark.slow
def test_a_tag_without_a_network_fails_fast_with_a_sentence():
    with pytest.raises(UserError, match="no published weights"):
        nextvit.create_model("nextvit_nano", weights="in1k")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}"}
        done = run("info", "nextvit_small", env=environment)
        assert done.returncode == 0, "what needs no network does not ask for it"
        done = run("eval", "nextvit_small", "demo", "--weights", "in1k", env=environment)
    assert done.returncode == 2
    assert "cannot get timm/nextvit_small.bd_in1k from the hub" in done.stderr


def test_a_tag_is_fetched_from_the_hub_with_its_preprocessing_and_found_again_offline(small, tmp_path):
    """A server that answers as the hub does, over HTTP; the client is the real one."""
    save_file({k: v.contiguous() for k, v in small.state_dict().items()}, tmp_path / "model.safetensors")
    config = {"input_size": [3, 384, 384], "crop_pct": 1.0, "interpolation": "bicubic"}
    config |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "nextvit_small", "pretrained_cfg": config}))

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, *, body):
            file = tmp_path / self.path.rpartition("/")[2]
            content = file.read_bytes() if file.is_file() and "bd_in1k_384/resolve" in self.path else b""
            self.send_response(200 if content or self.path == "/" else 404)
            self.send_header("ETag", f'"{len(content):040x}"')
            self.send_header("X-Repo-Commit", "1" * 40)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    script = (
        "import nextvit; m = nextvit.create_model('nextvit_small', weights='in1k_384');"
        "print(m.metadata.preprocess.image_size, m.metadata.preprocess.crop,"
        "m.metadata.labels[0], m.norm.weight[0].item())"
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
    environment["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    expected = f"384 1.0 tench {small.norm.weight[0].item()}\n"
    first = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert first.stdout == expected, first.stderr
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"input_size": [3, 384, 384]}}))
    environment["HF_HOME"] = str(tmp_path / "other hub")
    bare = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert "config.json of timm/nextvit_small.bd_in1k_384 does not say how images are prepared" in bare.stderr
    environment["HF_HOME"] = str(tmp_path / "hub")
    server.shutdown()
    again = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert again.stdout == expected, again.stderr
