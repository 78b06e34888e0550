"""Weights: strict loading, what is said when a checkpoint is broken, dummy weights, fingerprint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from serve_app.errors import ConfigurationError, ModelNotFoundError, WeightsError
from serve_app.hub import resolve_model
from serve_app.models.weights import EMBEDDING, HEAD, DummyWeights, WeightLoader, weights_fingerprint


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        EMBEDDING: torch.randn(7, 300, generator=generator),
        "model.norm.weight": torch.randn(300, generator=generator).to(torch.bfloat16),
        HEAD: torch.randn(7, 300, generator=generator),
    }


def write_single(directory: Path, content: dict[str, torch.Tensor] | None = None) -> Path:
    path = directory / "model.safetensors"
    save_file(tensors() if content is None else content, path)
    (directory / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return path


def write_shards(directory: Path) -> Path:
    """Two shards: the embedding in the first, the rest in the second. Returns the index's path."""
    content = tensors()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({EMBEDDING: content.pop(EMBEDDING)}, directory / first)
    save_file(content, directory / second)
    index = directory / "model.safetensors.index.json"
    weight_map = {EMBEDDING: first} | dict.fromkeys(content, second)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("write", [write_single, write_shards])
def test_takes_every_tensor_once(write: Callable[[Path], Path], tmp_path: Path) -> None:
    write(tmp_path)
    loader = WeightLoader(tmp_path)
    assert loader.num_tensors == 3
    taken = {name: loader.take(name, value.shape, torch.float32) for name, value in tensors().items()}
    loader.finish()
    for name, value in tensors().items():  # still readable after the files were closed
        assert taken[name].dtype == torch.float32
        assert torch.equal(taken[name], value.float())


def test_converts_between_floating_point_types(tmp_path: Path) -> None:
    write_single(tmp_path)
    with WeightLoader(tmp_path) as loader:
        taken = loader.take(HEAD, (7, 300), torch.bfloat16)
    assert torch.equal(taken, tensors()[HEAD].to(torch.bfloat16))


def test_writing_to_a_taken_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = write_single(tmp_path)
    before = path.read_bytes()
    with WeightLoader(tmp_path) as loader:
        loader.take(HEAD, (7, 300), torch.float32).zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("shape", [(300, 7), (7, 299), (2100,), (7, 300, 1)])
def test_wrong_shape_names_both(shape: tuple[int, ...], tmp_path: Path) -> None:
    write_single(tmp_path)
    with WeightLoader(tmp_path) as loader, pytest.raises(WeightsError) as caught:
        loader.take(HEAD, shape, torch.float32)
    for word in (HEAD, "model.safetensors", "[7, 300]", str(list(shape))):
        assert word in str(caught.value)


def test_missing_and_twice_taken_tensors(tmp_path: Path) -> None:
    write_single(tmp_path)
    with WeightLoader(tmp_path) as loader:
        with pytest.raises(WeightsError, match=r"'model\.layers\.9' of shape .* is missing"):
            loader.take("model.layers.9", (1,), torch.float32)
        loader.take(HEAD, (7, 300), torch.float32)
        with pytest.raises(WeightsError, match=r"'lm_head\.weight' .* taken twice"):
            loader.take(HEAD, (7, 300), torch.float32)


def test_left_over_tensors_are_named(tmp_path: Path) -> None:
    extra = {f"model.layers.{i}.extra": torch.zeros(1) for i in range(6)}
    write_single(tmp_path, extra | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    loader = WeightLoader(tmp_path)
    with pytest.raises(WeightsError, match=r"'model\.layers\.0\.extra'.* and 2 more") as caught:
        loader.finish()
    assert "inv_freq" not in str(caught.value)


@pytest.mark.parametrize("is_equal", [True, False])
def test_head_beside_tied_embeddings(is_equal: bool, tmp_path: Path) -> None:
    """transformers ties only if the two are equal, and goes on with two matrices otherwise. Here that is an error."""
    embedding = tensors()[EMBEDDING]
    write_single(tmp_path, {EMBEDDING: embedding, HEAD: embedding.clone() if is_equal else embedding + 1})
    loader = WeightLoader(tmp_path, tie_word_embeddings=True)
    loader.take(EMBEDDING, (7, 300), torch.float32)
    if is_equal:
        loader.finish()
        return
    with pytest.raises(WeightsError, match=r"differs from .* tie_word_embeddings"):
        loader.finish()


def test_untied_head_left_over(tmp_path: Path) -> None:
    write_single(tmp_path, {HEAD: torch.zeros(2)})
    with pytest.raises(WeightsError, match=r"lm_head\.weight"):
        WeightLoader(tmp_path).finish()


def test_quantized_tensor_is_refused(tmp_path: Path) -> None:
    write_single(tmp_path, {HEAD: torch.zeros(2, 2, dtype=torch.int8)})
    with WeightLoader(tmp_path) as loader, pytest.raises(WeightsError, match=r"lm_head\.weight.* is int8"):
        loader.take(HEAD, (2, 2), torch.float32)


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 40, -1], ids=lambda n: f"cut-{n}")
def test_truncated_file(num_bytes: int, tmp_path: Path) -> None:
    path = write_single(tmp_path)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(WeightsError, match=r"model\.safetensors is truncated or corrupt"):
        WeightLoader(tmp_path)


def test_corrupt_header(tmp_path: Path) -> None:
    path = write_single(tmp_path)
    content = bytearray(path.read_bytes())
    content[8:20] = b"\xff" * 12
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors is truncated or corrupt"):
        WeightLoader(tmp_path)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        weights_fingerprint(tmp_path)


def test_index_that_disagrees_with_its_shards(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    good = json.loads(index.read_text())
    second = "model-00002-of-00002.safetensors"

    def expect(weight_map: object, match: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(WeightsError, match=match):
            WeightLoader(tmp_path)

    expect(good["weight_map"] | {"x": "model-3.safetensors"}, r"model-3\.safetensors is missing")
    expect(good["weight_map"] | {"x": second}, "'x' is missing in .*00002-of-00002")
    expect(good["weight_map"] | {"x": "../model.safetensors"}, "plain file name")
    expect([1], r"index\.json is corrupt")
    expect({HEAD: second}, r"'model\.norm\.weight' .* duplicate, or unknown")
    index.write_text("{")
    with pytest.raises(WeightsError, match=r"index\.json is corrupt"):
        WeightLoader(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file(tensors(), tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"'model\.embed_tokens\.weight' of .*00002-of-00002.* is a duplicate"):
        WeightLoader(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor"):
        WeightLoader(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin, which must be converted"):
        WeightLoader(tmp_path)


def test_progress_only_where_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_single(tmp_path)
    with WeightLoader(tmp_path) as loader:
        loader.take(HEAD, (7, 300), torch.float32)
    assert capsys.readouterr().err == ""
    with WeightLoader(tmp_path, progress=True) as loader:
        loader.take(HEAD, (7, 300), torch.float32)
    assert "Loading weights" in capsys.readouterr().err


def test_dummy_weights_depend_on_seed_and_name_only() -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", HEAD]

    def take(order: list[str], seed: int) -> dict[str, torch.Tensor]:
        weights = DummyWeights(seed)
        taken = {name: weights.take(name, (50, 33), torch.float32) for name in order}
        weights.finish()
        return taken

    forward, backward, other = take(names, 5), take(names[::-1], 5), take(names, 6)
    for name in names:
        assert torch.equal(forward[name], backward[name])
        assert not torch.equal(forward[name], other[name])
        assert abs(forward[name].std().item() - 0.02) < 0.002
    assert not torch.equal(forward[names[0]], forward[names[1]])


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_norm.weight"]
)
def test_dummy_norms_are_near_one(name: str) -> None:
    weights = DummyWeights()
    taken = weights.take(name, (65,), torch.bfloat16)
    assert taken.dtype == torch.bfloat16
    assert 0.9 < taken.min() < taken.max() < 1.1
    with pytest.raises(WeightsError, match="taken twice"):
        weights.take(name, (65,), torch.bfloat16)


@pytest.mark.parametrize("write", [write_single, write_shards])
def test_fingerprint_sees_values_config_and_headers(write: Callable[[Path], Path], tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    first = weights_fingerprint(tmp_path / "a")
    assert first == weights_fingerprint(tmp_path / "b")
    assert len(first) == 64

    (tmp_path / "b" / "config.json").write_text("{}")
    assert weights_fingerprint(tmp_path / "b") != first

    path = max((tmp_path / "c").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert weights_fingerprint(tmp_path / "c") != first


def test_a_directory_is_used_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigurationError, match="'main'"):
        resolve_model(str(tmp_path), revision="main")


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_path_is_never_asked_of_the_hub(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFoundError, match="is not a directory") as caught:
        resolve_model(model)
    assert repr(model) in str(caught.value)


def test_a_name_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision))
        assert {"*.safetensors", "*.json", "*.jinja"} <= set(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("some/model", revision="v2") == tmp_path
    assert asked == [("some/model", "v2")]


def test_hub_errors_name_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="'some/model' at revision 'v2'"):
        resolve_model("some/model", revision="v2")
    with pytest.raises(ModelNotFoundError, match="bad name"):
        resolve_model("bad name")


@pytest.mark.parametrize("has_head", [False, True])
def test_a_checkpoint_without_the_models_own_prefix(
    tmp_path: Path, has_head: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As embedding models are saved: the decoder alone, often without its head."""
    content = {name.removeprefix("model."): value for name, value in tensors().items() if has_head or name != HEAD}
    write_single(tmp_path, content)
    with WeightLoader(tmp_path) as loader:
        taken = {name: loader.take(name, value.shape, torch.float32) for name, value in tensors().items()}
        with pytest.raises(WeightsError, match="taken twice"):
            loader.take("model.norm.weight", (300,), torch.float32)
        with pytest.raises(WeightsError, match=r"'model\.layers\.9' of shape \[1\] is missing"):
            loader.take("model.layers.9", (1,), torch.float32)
        loader.finish()
    expected = tensors() if has_head else {**tensors(), HEAD: tensors()[EMBEDDING]}
    for name, value in expected.items():
        assert torch.equal(taken[name], value.float()), name
    assert ("answers are noise" in caplog.text) is not has_head
