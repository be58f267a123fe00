"""save and load: what comes back is what was there, and a file that lies is found out."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import struct
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import vqtriton
from vqtriton import VectorQuantize, serialization

DIM, SIZE = 6, 10
# a value other than the default for each argument that has one
OPTIONS = {
    "codebook_update": "gradient",
    "decay": 0.5,
    "reduction": "sum",
    "commitment_weight": 0.75,
    "codebook_weight": 2.0,
    "kmeans_init": True,
    "kmeans_iters": 3,
    "threshold_ema_dead_code": 0.125,
    "channel_last": False,
    "accept_image_fmap": True,
    "accept_3d_fmap": True,
    "codebook_dim": 4,
    "heads": 2,
    "separate_codebook_per_head": True,
    "use_cosine_sim": True,
    "layernorm_after_project_in": True,
    "rotation_trick": True,
    "sync_codebook": False,
    "precision": "fast",
    "backend": "torch",
}
NAMES = ("cluster_size", "codebook")


def trained(**options) -> VectorQuantize:
    """A quantizer whose every tensor has left its initial value."""
    vq = VectorQuantize(DIM, SIZE, **options)
    for _ in range(3):
        vq(torch.randn(50, DIM, requires_grad=True))
    return vq


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "vq.safetensors"
    vqtriton.save(trained(), path)
    return path


def parts(path: Path) -> tuple[dict, bytes]:
    """Header and body of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(path: Path, header: dict | bytes, body: bytes) -> None:
    packed = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + body)


def rewrite(path: Path, change) -> None:
    """Saves the tensors and the metadata again after ``change(tensors, metadata)``."""
    with safe_open(path, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {n: opened.get_tensor(n).clone() for n in NAMES}
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def configure(path: Path, config) -> None:
    """Replaces the configuration: by a text, or by what is no text as JSON."""
    text = config if isinstance(config, str) else json.dumps(config)
    rewrite(path, lambda tensors, metadata: metadata.update({serialization.FORMAT: text}))


def refused(path: Path, *words: str) -> str:
    """The message of the ValueError that loading must give; it names the file and the words."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as raised:
        vqtriton.load(path)
    # a subclass would be one that escaped from somewhere
    assert raised.type is ValueError
    message = str(raised.value)
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("as_text", [True, False])
def test_round_trip(update, as_text, tmp_path):
    vq = trained(codebook_update=update, threshold_ema_dead_code=0.5)
    path = tmp_path / "vq.safetensors"
    vqtriton.save(vq, str(path) if as_text else path)
    loaded = vqtriton.load(str(path) if as_text else path)
    assert type(loaded) is VectorQuantize
    # a server that loads it must not train it
    assert not loaded.training
    assert loaded.config == vq.config
    state = vq.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name
    assert isinstance(loaded.codebook, torch.nn.Parameter) == (update == "gradient")

    # as one goes on to train, so does the other
    x = torch.randn(40, DIM)
    for module in (vq, loaded.train()):
        torch.manual_seed(1)
        module.result = module(x)
    for ours, theirs in zip(loaded.result, vq.result, strict=True):
        assert torch.equal(ours, theirs)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, vq.state_dict()[name]), name


def test_every_option_is_tried():
    parameters = inspect.signature(VectorQuantize).parameters
    assert set(OPTIONS) == set(parameters) - {"dim", "codebook_size"}
    assert not [name for name, value in OPTIONS.items() if parameters[name].default == value]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_survives(name, tmp_path):
    vq = VectorQuantize(DIM, SIZE, **{name: OPTIONS[name]})
    vq.set_codebook(torch.randn(vq.codebook.shape))
    vqtriton.save(vq, tmp_path / "vq")
    loaded = vqtriton.load(tmp_path / "vq")
    assert getattr(loaded, name) == OPTIONS[name]
    assert type(getattr(loaded, name)) is type(OPTIONS[name])
    assert loaded.config == vq.config


@pytest.mark.parametrize("is_trained", [True, False])
def test_kmeans_init_is_done_once(is_trained, tmp_path):
    """Loaded after it, the codebook stays; loaded before it, the first batch still makes it."""
    vq = VectorQuantize(DIM, SIZE, kmeans_init=True, decay=1.0)
    if is_trained:
        vq(torch.randn(50, DIM))
    with contextlib.nullcontext() if is_trained else pytest.warns(UserWarning, match="no codes"):
        vqtriton.save(vq, tmp_path / "vq")
    loaded = vqtriton.load(tmp_path / "vq").train()
    loaded(torch.randn(50, DIM) + 100)
    # with decay 1 nothing else moves it
    assert (loaded.codebook.mean() > 50) == (not is_trained)


def test_file_is_float32_and_on_the_cpu(tmp_path):
    vqtriton.save(trained().half(), tmp_path / "vq")
    loaded = vqtriton.load(tmp_path / "vq", device=torch.device("cpu"))
    assert loaded.codebook.dtype == torch.float32
    assert loaded.codebook.device.type == "cpu"


def test_loads_without_the_file(file):
    """Nothing is left mapped: the file may change or go."""
    loaded = vqtriton.load(file)
    before = loaded.codebook.clone()
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(loaded.codebook, before)


@pytest.mark.skipif(os.name != "posix", reason="permissions of posix")
def test_file_has_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        vqtriton.save(trained(), tmp_path / "vq")
    finally:
        os.umask(before)
    assert (tmp_path / "vq").stat().st_mode & 0o777 == 0o640


class Failure(BaseException):
    """As abrupt as an interrupt."""


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_failed_save_leaves_the_old_file(when, file, monkeypatch):
    old = file.read_bytes()

    def fail(*args):
        if when == "writing":
            Path(args[1]).write_bytes(b"half a fi")
        raise Failure

    if when == "writing":
        monkeypatch.setattr(serialization, "save_file", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(Failure):
        vqtriton.save(trained(), file)
    monkeypatch.undo()
    assert file.read_bytes() == old
    assert list(file.parent.iterdir()) == [file]


def test_save_replaces_in_one_step(file):
    """A reader that has the old file open goes on reading the old file."""
    old = file.read_bytes()
    with file.open("rb") as reader:
        vqtriton.save(VectorQuantize(DIM, SIZE), file)
        assert reader.read() == old
    assert file.read_bytes() != old
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("name", NAMES)
def test_save_refuses_what_is_not_finite(name, file):
    old = file.read_bytes()
    vq = trained()
    for bad in (float("nan"), float("inf"), -float("inf")):
        getattr(vq, name).view(-1)[3] = bad
        with pytest.raises(ValueError, match=rf"vq\.{name} holds NaN or infinity"):
            vqtriton.save(vq, file)
    assert file.read_bytes() == old
    assert list(file.parent.iterdir()) == [file]


def test_save_refuses_another_module(tmp_path):
    for thing in (torch.nn.Linear(2, 2), trained().state_dict(), None):
        with pytest.raises(TypeError, match="it must be a VectorQuantize"):
            vqtriton.save(thing, tmp_path / "vq")
    assert not list(tmp_path.iterdir())


def test_save_refuses_what_load_would_refuse(tmp_path):
    weight = "codebook_weight"
    for name, value in ((weight, float("inf")), ("kmeans_init", 1), (weight, torch.tensor(1.0))):
        vq = VectorQuantize(DIM, SIZE)
        setattr(vq, name, value)
        with pytest.raises((TypeError, ValueError), match=name):
            vqtriton.save(vq, tmp_path / "vq")
    assert not list(tmp_path.iterdir())


def test_equal_modules_give_equal_files(tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(0)
        vqtriton.save(trained(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_load_draws_no_random_numbers(file):
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    vqtriton.load(file)
    assert torch.equal(torch.rand(1), want)


def test_save_where_it_cannot(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        vqtriton.save(trained(), tmp_path / "nowhere" / "vq")
    with pytest.raises(OSError, match="folder"):
        vqtriton.save(trained(), tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_load_where_there_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nothing"):
        vqtriton.load(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        vqtriton.load(tmp_path)


# --- files that lie ---


def test_truncated_anywhere(file):
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    ends = {0, 1, 7, 8, 9, 8 + length // 2, 7 + length, 8 + length, 9 + length, len(whole) - 1}
    for end in ends | set(range(0, len(whole), 97)):
        file.write_bytes(whole[:end])
        refused(file, "is not a whole safetensors file")
    file.write_bytes(whole + b"\0")
    refused(file, "is not a whole safetensors file")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff" * 500, id="header of 16 EiB"),
        pytest.param(b"# a text\n" * 50, id="text"),
        pytest.param(struct.pack("<Q", 40) + b"\xff\xfe" * 20, id="header not UTF-8"),
        pytest.param(struct.pack("<Q", 2) + b"[]", id="header a list"),
    ],
)
def test_no_safetensors(content, file):
    file.write_bytes(content)
    refused(file, "is not a whole safetensors file")


def test_pickle_is_not_run(tmp_path):
    torch.save(trained().state_dict(), tmp_path / "vq.pt")
    refused(tmp_path / "vq.pt", "is not a whole safetensors file")


def test_foreign_safetensors(file):
    header, body = parts(file)
    del header["__metadata__"]
    write(file, header, body)
    refused(file, "was not written by vqtriton.save")
    write(file, {}, b"")
    refused(file, "was not written by vqtriton.save")
    for metadata in (None, {}, {"format": "pt"}, {"config": "{}"}):
        save_file({"weight": torch.zeros(2)}, file, metadata)
        refused(file, "was not written by vqtriton.save")


@pytest.mark.parametrize(
    "config",
    [
        *("", "{", "no JSON", "[]", "[1, 2]", "3", "null", '"text"', "true", "{}"),
        # nested beyond the stack; a number that Python refuses to read
        *("[" * 100_000, "9" * 5000),
    ],
    ids=lambda config: config[:12] or "empty",
)
def test_configuration_is_no_set_of_arguments(config, file):
    configure(file, config)
    refused(file, "has a configuration that builds no module")


def test_configuration_has_other_arguments(file):
    config = trained().config
    for name in ("groups", "self", "return", ""):
        configure(file, config | {name: 1})
        refused(file, "has a configuration that builds no module", name)
    for name in ("dim", "codebook_size"):
        configure(file, {key: value for key, value in config.items() if key != name})
        refused(file, "has a configuration that builds no module", name)
    # what has a default may be left out, and the tensors are the same for either update
    configure(file, {"dim": DIM, "codebook_size": SIZE})
    assert vqtriton.load(file).config == VectorQuantize(DIM, SIZE).config
    configure(file, config | {"codebook_update": "gradient"})
    assert isinstance(vqtriton.load(file).codebook, torch.nn.Parameter)


WRONG = [None, [1], {"a": 1}, "6"]
WRONG_VALUES = {
    "dim": [*WRONG, 6.0, True, 0, -6, 10**30],
    "codebook_size": [*WRONG, 10.0, True, 0, -10, 2**63],
    "codebook_update": [None, ["ema"], 1, "EMA", ""],
    "decay": [*WRONG, True, -0.1, 1.1, float("nan"), float("inf"), 10**400],
    "reduction": [None, ["mean"], 1, "average"],
    "commitment_weight": [*WRONG, True, -1, float("inf")],
    "codebook_weight": [*WRONG, True, -1, float("inf")],
    "kmeans_init": [*WRONG, "false", 0, 1.0],
    "kmeans_iters": [*WRONG, 2.5, True, -1, float("inf")],
    "threshold_ema_dead_code": [*WRONG, True, -1, float("inf")],
    "channel_last": [*WRONG, "no", 0],
    "accept_image_fmap": [*WRONG, "no", 0],
    "accept_3d_fmap": [*WRONG, "no", 0],
    "use_cosine_sim": [*WRONG, "no", 0],
    "rotation_trick": [*WRONG, "no", 0],
    "separate_codebook_per_head": [*WRONG, "no", 0],
    "layernorm_after_project_in": [*WRONG, "no", 0],
    "codebook_dim": [*WRONG[1:], 6.0, True, 0, -6],
    "heads": [*WRONG, 6.0, True, 0, -6],
    "sync_codebook": [*WRONG, "no", 0],
    "precision": [None, ["exact"], 1, "exactly"],
    "backend": [None, ["auto"], 1, "cuda"],
}


def test_every_argument_is_lied_about():
    assert set(WRONG_VALUES) == set(inspect.signature(VectorQuantize).parameters)


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_configuration_with_a_wrong_value(name, file):
    for value in WRONG_VALUES[name]:
        configure(file, trained().config | {name: value})
        message = refused(file, "has a configuration that builds no module")
        # what is too large for an int64 is torch's to complain of
        assert name in message or (isinstance(value, int) and value >= 2**63), value


@pytest.mark.parametrize("name", ["dim", "codebook_size"])
def test_sizes_do_not_match(name, file):
    """And however large, no memory is asked for."""
    for size in (SIZE - 1, SIZE + 1, 10**12, 2**55):
        configure(file, trained().config | {name: size})
        refused(file, "configuration says")


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_does_not_fit(name, file):
    whole = file.read_bytes()

    def check(change, *words: str) -> None:
        file.write_bytes(whole)
        rewrite(file, lambda tensors, metadata: change(tensors))
        refused(file, *words)

    says = "its configuration says"
    check(lambda tensors: tensors.update({name: tensors[name][None].clone()}), "is (1,", says)
    for dtype in (torch.float16, torch.float64, torch.int32, torch.uint8):
        check(
            lambda tensors, dtype=dtype: tensors.update({name: tensors[name].to(dtype)}),
            *(f"{name} is ", f"{dtype}", says),
        )
    for bad in (float("nan"), float("inf"), -float("inf")):
        check(
            lambda tensors, bad=bad: tensors[name].view(-1)[-1:].fill_(bad),
            f"{name} holds NaN or infinity",
        )
    check(lambda tensors: tensors.pop(name), "expected", name)
    check(lambda tensors: tensors.update(stowaway=torch.zeros(2)), "stowaway")


# dtypes that safetensors names, with their bits; torch may not have them, or have no isfinite
@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("F4", 4), ("F6_E2M3", 6), ("F8_E8M0", 8), ("F8_E4M3", 8), ("C64", 64), ("U16", 16)],
)
def test_exotic_dtype(dtype, bits, file):
    header, body = parts(file)
    start, stop = header["cluster_size"]["data_offsets"]
    # the other tensor first, where it stays whatever the size of this one
    header["cluster_size"]["data_offsets"] = [0, stop - start]
    end = stop - start + DIM * SIZE * bits // 8
    header["codebook"] |= {"dtype": dtype, "data_offsets": [stop - start, end]}
    write(file, header, body[start:stop] + bytes(end - (stop - start)))
    word = dtype if "6_" in dtype else "codebook is "
    # safetensors 0.5 knows fewer dtypes, and names none that it does not know
    refused(file, "" if safetensors.__version__.startswith("0.5.") else word)


# --- residual quantizers ---

RESIDUAL = {
    "levels": (vqtriton.ResidualVectorQuantize, {}),
    "sizes": (vqtriton.ResidualVectorQuantize, {"codebook_size": (4, 10, 7)}),
    "projected": (vqtriton.ResidualVectorQuantize, {"codebook_dim": 4, "decay": 0.5}),
    "shared": (vqtriton.ResidualVectorQuantize, {"shared_codebook": True}),
    "gradient": (vqtriton.ResidualVectorQuantize, {"codebook_update": "gradient"}),
    "grouped": (vqtriton.GroupedResidualVectorQuantize, {"groups": 2, "quant_grad_frac": 0.25}),
    "grouped shared": (
        vqtriton.GroupedResidualVectorQuantize,
        {"groups": 3, "shared_codebook": True, "use_cosine_sim": True},
    ),
}


def trained_residual(name: str):
    kind, options = RESIDUAL[name]
    options = {"codebook_size": SIZE, "num_quantizers": 3, **options}
    rvq = kind(DIM, **options)
    for _ in range(3):
        rvq(torch.randn(50, DIM, requires_grad=True))
    return rvq


def rewrite_residual(path: Path, change) -> None:
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {n: opened.get_tensor(n).clone() for n in opened.keys()}  # noqa: SIM118
    ((key, config),) = metadata.items()
    config = json.loads(config)
    change(tensors, config)
    save_file(tensors, path, {key: json.dumps(config)})


@pytest.mark.parametrize("name", RESIDUAL)
def test_round_trip_of_residual_quantizers(name, tmp_path):
    rvq, path = trained_residual(name), tmp_path / "rvq"
    vqtriton.save(rvq, path)
    loaded = vqtriton.load(path)
    assert type(loaded) is RESIDUAL[name][0]
    assert not loaded.training
    assert loaded.config == rvq.config
    state = rvq.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    x = torch.randn(40, DIM)
    for module in (rvq, loaded.train()):
        torch.manual_seed(1)
        module.result = module(x)
    for ours, theirs in zip(loaded.result, rvq.result, strict=True):
        assert torch.equal(ours, theirs)
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, rvq.state_dict()[key]), key


def test_the_class_is_named_and_a_shared_codebook_is_written_once(tmp_path):
    vqtriton.save(trained_residual("shared"), tmp_path / "rvq")
    with safe_open(tmp_path / "rvq", framework="pt") as opened:
        assert [*opened.metadata()] == ["vqtriton.ResidualVectorQuantize"]
        assert sorted(opened.keys()) == ["layers.0.cluster_size", "layers.0.codebook"]
    loaded = vqtriton.load(tmp_path / "rvq")
    assert len({id(layer) for layer in loaded.layers}) == 1
    assert len(loaded.layers) == 3


@pytest.mark.parametrize("name", ["levels", "shared", "grouped"])
def test_residual_files_that_lie_about_sizes(name, tmp_path):
    """However large, neither memory nor time is asked for."""
    path = tmp_path / "rvq"
    vqtriton.save(trained_residual(name), path)
    whole = path.read_bytes()

    def check(config: dict, *words: str) -> None:
        path.write_bytes(whole)
        rewrite_residual(path, lambda tensors, own: own.update(config))
        refused(path, *words)

    no_module = "has a configuration that builds no module"
    for size in (SIZE - 1, 10**12, 2**55):
        check({"codebook_size": [size] * 3}, "configuration says")
    check({"dim": 6 * 10**12}, "configuration says")
    check({"num_quantizers": 10**9}, no_module, "num_quantizers")
    check({"codebook_size": SIZE, "num_quantizers": 10**9}, no_module, "must be a list")
    check({"codebook_size": [SIZE] * 2, "num_quantizers": 10**9}, no_module, "num_quantizers")
    check({"decay": 2.0}, no_module, "decay")
    check({"extra": 1}, no_module, "extra")
    if name == "grouped":
        check({"groups": 10**9, "dim": 10**9}, no_module, "groups")
    if name != "shared":
        levels = {"codebook_size": [SIZE] * 10**5, "num_quantizers": 10**5}
        check(levels, no_module, "codebook_size")


def test_residual_files_with_other_tensors(tmp_path):
    path, weight = tmp_path / "rvq", "layers.1.codebook"
    vqtriton.save(trained_residual("projected"), path)
    whole = path.read_bytes()

    def check(change, *words: str) -> None:
        path.write_bytes(whole)
        rewrite_residual(path, lambda tensors, config: change(tensors))
        refused(path, *words)

    for key in (weight, "layers.2.cluster_size", "project_in.weight"):
        check(lambda tensors, key=key: tensors.pop(key), "expected", key)
        for bad in (float("nan"), float("inf")):
            check(lambda tensors, key=key, bad=bad: tensors[key].fill_(bad), key, "holds NaN")
        check(lambda tensors, key=key: tensors.update({key: tensors[key].half()}), key, "float16")
    check(lambda tensors: tensors.update({weight: tensors[weight][:3].clone()}), weight, "(3, 4)")
    check(lambda tensors: tensors.update({"layers.3.codebook": torch.ones(2)}), "layers.3.codebook")
    # a file of one class is not one of another
    path.write_bytes(whole)
    with safe_open(path, framework="pt") as opened:
        ((_, config),) = opened.metadata().items()
        tensors = {n: opened.get_tensor(n).clone() for n in opened.keys()}  # noqa: SIM118
    save_file(tensors, path, {"vqtriton.GroupedResidualVectorQuantize": config})
    refused(path, "expected", "rvqs.0.layers.0.codebook")


def test_residual_quantizers_that_cannot_be_saved(tmp_path):
    rvq = trained_residual("levels")
    rvq.layers[1].codebook[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"vq\.layers\.1\.codebook holds NaN"):
        vqtriton.save(rvq, tmp_path / "rvq")
    rvq = trained_residual("levels")
    rvq.quant_grad_frac = 2.0
    with pytest.raises(ValueError, match="quant_grad_frac"):
        vqtriton.save(rvq, tmp_path / "rvq")

    class Other(vqtriton.ResidualVectorQuantize):
        pass

    with pytest.raises(TypeError, match="vq is a Other; it must be a VectorQuantize or a residual"):
        vqtriton.save(Other(DIM, SIZE, 2), tmp_path / "rvq")
    assert not list(tmp_path.iterdir())
