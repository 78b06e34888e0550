"""ModelRunner: the Runner that runs a model. Knows the order of start-up; what differs by device is the Device's.

resolve the model -> choose the device -> load -> KV cache -> get ready -> launch(plan), step after step
"""

from __future__ import annotations

from pathlib import Path

import torch

from serve_app.engine.config import FAST_MODE, EngineConfig
from serve_app.engine.engine import Step
from serve_app.engine.scheduler import SchedulerOutput
from serve_app.errors import ConfigurationError
from serve_app.hub import resolve_model
from serve_app.logs import get_logger
from serve_app.models.decoder import Decoder
from serve_app.models.decoder_config import IMPLEMENTATIONS, DecoderConfig, load_model_config
from serve_app.models.model import Model, ModelConfig
from serve_app.models.transformers_config import TransformersConfig
from serve_app.models.transformers_model import TransformersModel
from serve_app.models.weights import DummyWeights, WeightLoader, weights_fingerprint
from serve_app.runner.device import Device
from serve_app.runner.gpu import find_gpu
from serve_app.runner.kv_cache import describe
from serve_app.text.token_masks import GrammarTokenizer

logger = get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "dummy")


class ModelRunner:
    """``model``: a directory or hub id. ``dtype``, ``device``: "auto" or a name; ``load_format``: "auto" or "dummy".

    ``device`` "auto" is the GPU if there is one. ``implementation``: see `load_model_config`. ``tokenizer``: the
    directory of the tokenizer that grammars mean, where it is not the model's. Raises a StartupError that names what is
    wrong before any weight is read, where that is possible.
    """

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig,
        *,
        dtype: str = "auto",
        device: str = "auto",
        load_format: str = "auto",
        revision: str | None = None,
        implementation: str = "auto",
        tokenizer: str | Path | None = None,
    ) -> None:
        _check_choice("dtype", dtype, ("auto", *DTYPES))
        _check_choice("device", device, DEVICES)
        _check_choice("load_format", load_format, LOAD_FORMATS)
        _check_choice("implementation", implementation, IMPLEMENTATIONS)
        self.config = config
        self.directory = resolve_model(model, revision)
        self.model_config = load_model_config(self.directory, implementation)
        self.load_format = load_format
        self.max_model_len = _max_model_len(config, self.model_config)
        self.vocab_size = self.model_config.vocab_size
        self.eos_token_ids = frozenset(self.model_config.eos_token_ids)

        # Its thread works while the weights are read.
        self.grammars = GrammarTokenizer.of_directory(
            self.directory if tokenizer is None else Path(tokenizer), self.vocab_size, self.eos_token_ids
        )
        self.grammars.start()

        self.device = make_device(device, config, self.model_config, self.max_model_len)
        self.ops = self.device.ops
        self.max_steps_in_flight = self.device.max_steps_in_flight
        self.has_position_classes = self.device.has_position_classes
        self.model = self.device.load(self._load, None if dtype == "auto" else DTYPES[dtype])
        self.dtype = self.model.embedding_VE.dtype
        cache_dtype = self.dtype if config.kv_cache_dtype == "auto" else DTYPES[config.kv_cache_dtype]
        self.kv_cache = self.device.make_cache(self.model, cache_dtype)
        self.num_kv_blocks = self.kv_cache.num_blocks
        self.device.get_ready(self.model, self.kv_cache)
        self.fingerprint = self._fingerprint()
        for line in self.describe():
            logger.info(line)

    def describe(self) -> list[str]:
        """What was chosen, for the log."""
        dtype = str(self.dtype).removeprefix("torch.")
        where, mode = self.device.describe()
        model_line = (
            f"{self.model_config.architecture} from {self.directory}: {dtype}, {where}, {mode},"
            f" max_model_len {self.max_model_len}, numerics {self.fingerprint}"
        )
        return [
            model_line,
            describe(self.config, self.model_config, self.kv_cache.k[0].dtype, self.num_kv_blocks),
        ]

    @property
    def deterministic(self) -> bool:
        return self.device.deterministic

    def compile_grammar(self, text: str) -> object:
        return self.grammars.compile(text)

    @torch.inference_mode()
    def launch(self, plan: SchedulerOutput) -> Step:
        return self.device.launch(plan)

    def _load(self, dtype: torch.dtype) -> Model:
        config, device = self.model_config, self.device.torch_device
        if isinstance(config, TransformersConfig):
            seed = self.config.seed if self.load_format == "dummy" else None
            return TransformersModel(config, self.directory, self.ops, dtype, self.max_model_len, device, seed)
        assert isinstance(config, DecoderConfig)
        if self.load_format == "dummy":
            source: DummyWeights | WeightLoader = DummyWeights(self.config.seed)
        else:
            source = WeightLoader(self.directory, tie_word_embeddings=config.tie_word_embeddings)
        return Decoder(config, source, self.ops, dtype, self.max_model_len, device)

    def _fingerprint(self) -> str:
        weights = weights_fingerprint(self.directory) if self.load_format != "dummy" else f"dummy {self.config.seed}"
        mode = "" if self.deterministic else FAST_MODE
        return mode + self.device.fingerprint(
            {
                "weights": weights,
                "model": self.model_config,
                "dtype": self.dtype,
                "kv_cache_dtype": self.kv_cache.k[0].dtype,
                "deterministic": self.deterministic,
            }
        )


def make_device(name: str, config: EngineConfig, model_config: ModelConfig, max_model_len: int) -> Device:
    """The one place that chooses."""
    gpu = find_gpu(name)
    if gpu is None:
        from serve_app.runner.cpu_device import CpuDevice  # numba: a GPU needs none of it

        return CpuDevice(config, model_config, max_model_len)
    from serve_app.runner.cuda_device import CudaDevice  # Triton: a CPU needs none of it

    return CudaDevice(config, model_config, max_model_len, gpu)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is not None and config.max_model_len > model.max_model_len:
        raise ConfigurationError(
            f"max_model_len is {config.max_model_len}; the model's config allows at most {model.max_model_len}"
        )
    return config.max_model_len or model.max_model_len
