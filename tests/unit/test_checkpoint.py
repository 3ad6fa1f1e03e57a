"""Reading a checkpoint's own description, from a folder or from the hub."""

import json

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.errors import ConfigurationError, InvalidRequestError
from vllm_cfg_plugin.pipelines.registry import check_servable, describe


@pytest.fixture
def model(qwen_image_folders):
    return qwen_image_folders["tiny"]


def test_a_folder_describes_itself(model):
    info = describe(Checkpoint(str(model)))
    assert (info.size_multiple, info.text.max_tokens) == (16, 1024)
    assert info.image_tokens(64, 128) == 4 * 8
    # The real noise schedule stretches its sigmas to `shift_terminal`, which one step can't do.
    assert info.num_timesteps(2) == 2
    with pytest.raises(InvalidRequestError, match=r"num_inference_steps=1 .* at least 2 for this model"):
        info.num_timesteps(1)
    assert (info.default_params.height, info.default_params.num_inference_steps) == (1024, 50)
    assert info.default_params.negative_prompt is None


def test_a_models_own_defaults_win_over_its_familys(model, tmp_path):
    copy = linked_copy(model, tmp_path)
    (copy / "generation_config.json").write_text(json.dumps({"height": 64, "negative_prompt": " "}))
    defaults = describe(Checkpoint(str(copy))).default_params
    assert (defaults.height, defaults.width, defaults.negative_prompt) == (64, 1024, " ")


@pytest.mark.parametrize("content", ['{"height": "tall"}', "not json", "[]"])
def test_wrong_defaults_name_their_file(model, tmp_path, content):
    copy = linked_copy(model, tmp_path)
    (copy / "generation_config.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"generation_config\.json"):
        describe(Checkpoint(str(copy)))


def test_a_missing_component_is_named(model, tmp_path):
    copy = linked_copy(model, tmp_path)
    (copy / "vae").unlink()
    with pytest.raises(ConfigurationError, match=r"vae/config\.json is missing"):
        describe(Checkpoint(str(copy)))


def test_a_missing_shard_is_named(model, tmp_path):
    copy = linked_copy(model, tmp_path)
    (copy / "vae").unlink()
    (copy / "vae").mkdir()
    (copy / "vae/config.json").write_bytes((model / "vae/config.json").read_bytes())
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (copy / "vae/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match=r"vae/part-1\.safetensors is missing"):
        check_servable(Checkpoint(str(copy)))


@pytest.mark.parametrize("component", ["vae", "tokenizer", "text_encoder", "transformer", "scheduler"])
def test_a_component_that_the_index_names_must_be_there(model, tmp_path, component):
    copy = linked_copy(model, tmp_path)
    (copy / component).unlink()
    with pytest.raises(ConfigurationError, match=f"incomplete: {component}/ is missing"):
        check_servable(Checkpoint(str(copy)))


@pytest.mark.parametrize("component", ["vae", "text_encoder", "transformer"])
def test_a_model_without_weights_is_named(model, tmp_path, component):
    copy = linked_copy(model, tmp_path)
    (copy / component).unlink()
    (copy / component).mkdir()
    (copy / component / "config.json").symlink_to(model / component / "config.json")
    with pytest.raises(ConfigurationError, match=f"incomplete: {component}/ has no file of weights"):
        check_servable(Checkpoint(str(copy)))
    (copy / component / ("pytorch_model.bin" if component == "text_encoder" else "diffusion_pytorch_model.bin")).touch()
    with pytest.raises(ConfigurationError, match=f"{component}/ has its weights as pickles"):
        check_servable(Checkpoint(str(copy)))


def test_a_value_that_no_model_has_names_the_checkpoint(model, tmp_path):
    copy = linked_copy(model, tmp_path)
    (copy / "vae").unlink()
    (copy / "vae").mkdir()
    config = json.loads((model / "vae/config.json").read_text()) | {"temperal_downsample": 2}
    (copy / "vae/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=r"copy.*configuration files have a value.*TypeError"):
        describe(Checkpoint(str(copy)))


def test_a_whole_checkpoint_passes(model):
    check_servable(Checkpoint(str(model)))


def linked_copy(model, folder):
    copy = folder / "copy"
    copy.mkdir()
    for part in model.iterdir():
        (copy / part.name).symlink_to(part)
    return copy


@pytest.fixture
def hub(monkeypatch):
    """A hub that holds what a test puts into it: {(repository, revision, file): path}."""
    files = {}

    def download(repo_id, filename, revision=None):
        if repo_id not in {repo for repo, _, _ in files}:
            raise LocalEntryNotFoundError("offline")
        if (repo_id, revision, filename) not in files:
            raise EntryNotFoundError("no such file")
        return str(files[repo_id, revision, filename])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return files


def test_a_repository_is_described_from_its_small_files(model, hub):
    for name in ("model_index.json", "vae/config.json", "scheduler/scheduler_config.json"):
        hub["some/model", "v1", name] = model / name
    assert describe(Checkpoint("some/model", "v1")) == describe(Checkpoint(str(model)))
    check_servable(Checkpoint("some/model", "v1"))


def test_a_hub_that_cannot_be_reached_is_said(hub):
    with pytest.raises(ConfigurationError, match="hub can't be reached"):
        describe(Checkpoint("some/model"))


def test_a_cached_ordinary_model_is_known_without_the_hub(monkeypatch):
    """An ordinary model in the cache is known without asking the Hub."""
    cached = {"ordinary/model": ["config.json"], "a/pipeline": ["config.json", "model_index.json"]}

    def look_up(repo_id, filename, revision=None):
        return "/cache/file" if filename in cached[repo_id] else None

    def download(repo_id, filename, revision=None):
        asked.append(repo_id)
        raise LocalEntryNotFoundError("offline")

    asked = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", look_up)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert not Checkpoint("ordinary/model").is_diffusers()
    assert asked == []
    Checkpoint("a/pipeline").is_diffusers()
    assert asked == ["a/pipeline"]


def test_what_is_nowhere_is_no_diffusers_checkpoint(hub):
    assert not Checkpoint("some/model").is_diffusers()
    assert not Checkpoint("no repository!").is_diffusers()


def test_the_template_is_the_one_that_diffusers_uses(model):
    from diffusers import QwenImagePipeline

    text = describe(Checkpoint(str(model))).text
    pipeline = QwenImagePipeline.from_pretrained(model)
    assert text.template == pipeline.prompt_template_encode
    assert text.prefix_tokens == pipeline.prompt_template_encode_start_idx
    assert text.max_tokens == pipeline.tokenizer_max_length
