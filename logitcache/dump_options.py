"""Everything `logitcache dump` can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path, PurePath
from typing import Literal, get_args

from logitcache.codec import LayoutName
from logitcache.corpus import CorpusFields, PackingPolicy
from logitcache.errors import UsageError
from logitcache.models import choose_dtype
from logitcache.selection import Selection
from logitcache.store import ContainerKind, Wording, staging_folder
from logitcache.store.location import S3Location, parse_location
from logitcache.teachers import Nonfinite, ServerOptions, is_url

SETTLED_BY = {
    "codec.layout": "--codec",
    "container": "--container",
    "corpus.chat_template_sha256": "--teacher",
    "corpus.completion_field": "--completion-field",
    "corpus.files": "--corpus",
    "corpus.ids_field": "--ids-field",
    "corpus.mask_field": "--mask-field",
    "corpus.max_tokens": "--max-tokens",
    "corpus.messages_field": "--messages-field",
    "corpus.packing.block_length": "--block-length",
    "corpus.packing.bos": "--bos",
    "corpus.packing.eos": "--eos",
    "corpus.prompt_field": "--prompt-field",
    "corpus.text_field": "--text-field",
    "geometry.block_length": "--block-length",
    "geometry.unit_blocks": "--unit-tokens",
    "seed": "--seed",
    "selection": "--select",
    "teacher.compiled": "--compile",
    "teacher.dtype": "--dtype",
    "teacher.files": "--teacher",
    "teacher.name": "--teacher",
    "teacher.nonfinite": "--nonfinite",
    "teacher.revision": "--teacher",
    "teacher.served": "--teacher",
    "tokenizer": "--teacher",
}
Engine = Literal["local", "torchrun", "ray"]
ABSENT = {"teacher.compiled": False, "teacher.nonfinite": "fail"}
FOLLOWS = ("codec", "corpus", "geometry", "teacher.sha256", "vocab_size")


@dataclass(frozen=True)
class Output:
    """One cache to write.

    Args:
        selection: what it keeps.
        root: its folder; of a cache in a bucket the folder that its workers work in, which is removed in the end.
        url: `s3://bucket/prefix` of a cache in a bucket.
    """

    selection: Selection
    root: Path
    url: str | None = None

    @classmethod
    def at(cls, selection: Selection, location: str | Path, staging: Path | None = None) -> Output:
        """A cache in a folder or at a URL; its workers then work below `staging`, by default below `cache_home()`.

        Raises UsageError for a URL that is not one of a place in a bucket.
        """
        place = parse_location(location)
        if isinstance(place, S3Location):
            return cls(selection, staging_folder(place, staging), str(place))
        return cls(selection, place)

    @property
    def location(self) -> str:
        """Path or URL of the cache."""
        return self.url or str(self.root)


@dataclass(frozen=True)
class DumpOptions:
    """Everything `logitcache dump` can be told.

    Args:
        teacher: folder or hub id of an AutoModelForCausalLM, or URL of an OpenAI-style server.
        corpus: files, folders or glob patterns.
        outputs: the caches to write; all from the same forward passes.
        gguf_file: name of a GGUF file in the teacher's folder.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto", "cpu" or "cuda".
        device_map: spread the teacher over the devices of a machine, as `models.load_model`; None for one device.
        tensor_parallel: split each layer over all processes that torchrun started, which are one worker then.
        block_length: tokens in a block.
        max_tokens: stop the corpus after so many tokens.
        batch_tokens: tokens in one forward pass; "auto" finds what is fastest on a GPU, and is 4,096 elsewhere.
        unit_tokens: tokens committed at once; by default about 1/32 of the corpus, 16,384 to 4 million.
        seed: of sampled selections, 0 to 2^62 - 1.
        text_field: of JSONL objects and columns of Parquet and Arrow files, "text" unless given; the other fields as in
            `CorpusFields`.
        bos, eos: packing policy, "auto" or as in `PackingPolicy`. Messages and token ids have their own special
            tokens, so there "auto" is "none".
        container: kind of file the shards are, "zarr" or "arrow".
        nonfinite: what becomes of a row whose logits are NaN or infinite: "fail" ends the dump, "mask" leaves the row
            out and counts it; the cache is then a masked one.
        trust_remote_code: let a teacher run Python code of its own.
        codec: "small" stores the fewest bytes, "fast" is decoded several times as fast.
        engine: who starts the workers; see `logitcache.engines`.
        workers: processes with a teacher each; None for one, or with Ray one for each GPU.
        lease_seconds: a worker that shows no life for so long loses its unit to another.
        tokenizer: folder or hub id of the teacher's tokenizer; needed for a server, else by default the teacher's own.
        compile: run the teacher's body through torch.compile.
        server: how a server is asked.
    """

    teacher: str
    corpus: tuple[str, ...]
    outputs: tuple[Output, ...]
    gguf_file: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    tensor_parallel: bool = False
    block_length: int = 1024
    max_tokens: int | None = None
    batch_tokens: int | Literal["auto"] = "auto"
    unit_tokens: int | None = None
    seed: int = 0
    text_field: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    messages_field: str | None = None
    ids_field: str | None = None
    mask_field: str | None = None
    bos: str = "auto"
    eos: str = "auto"
    container: ContainerKind = "zarr"
    nonfinite: Nonfinite = "fail"
    trust_remote_code: bool = False
    codec: LayoutName = "small"
    engine: Engine = "local"
    workers: int | None = None
    lease_seconds: float = 60.0
    tokenizer: str | None = None
    compile: bool = False
    server: ServerOptions = field(default_factory=ServerOptions)

    def __post_init__(self) -> None:
        # Raise for what makes no sense, before anything is loaded.
        PackingPolicy(self.block_length)
        choose_dtype(self.dtype)
        if self.fields.kind == "messages" and not {self.bos, self.eos} <= {"auto", "none"}:
            raise UsageError(
                f"bos={self.bos!r} and eos={self.eos!r} were asked for, but the chat template writes the special "
                "tokens of messages; leave them at auto"
            )
        roots = [output.root.resolve() for output in self.outputs]
        if not roots or len(set(roots)) != len(roots):
            raise UsageError("every cache needs a folder of its own; give each selection another --out")
        for inner, outer in permutations(self.outputs, 2):
            if _place(outer) in _place(inner).parents:
                raise UsageError(f"{inner.location} would lie inside the cache {outer.location}; choose another folder")
        if isinstance(self.batch_tokens, str) and self.batch_tokens != "auto":
            raise UsageError(f"batch-tokens is {self.batch_tokens!r}; give a number of tokens, or auto")
        for name in ("max_tokens", "batch_tokens", "unit_tokens", "workers"):
            value = getattr(self, name)
            if value not in (None, "auto") and value < 1:
                raise UsageError(f"{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.engine not in get_args(Engine):
            raise UsageError(f"the engine must be one of {', '.join(get_args(Engine))}, not {self.engine!r}")
        if self.nonfinite not in get_args(Nonfinite):
            raise UsageError(f"nonfinite must be {' or '.join(get_args(Nonfinite))}, not {self.nonfinite!r}")
        if not 1 <= self.lease_seconds < math.inf:
            raise UsageError(f"lease-seconds is {self.lease_seconds:g}; it must be a number of at least 1")
        if not 0 <= self.seed < 1 << 62:
            raise UsageError(f"seed is {self.seed}; it must lie between 0 and 2^62 - 1")
        self._check_server()
        self._check_device_map()
        self._check_tensor_parallel()

    def _check_server(self) -> None:
        """What belongs to a server is given for one, and only then; what belongs to a model here is not."""
        if not self.served:
            if self.server != ServerOptions():
                raise UsageError(
                    f"{self.teacher} runs here, so no server is asked; give its URL as --teacher, or leave out "
                    "--teacher-model, --concurrency, --requests-per-second and --request-timeout"
                )
            return
        if self.tokenizer is None:
            raise UsageError("a server's teacher needs its tokenizer here; give its folder or hub id with --tokenizer")
        given = {
            "gguf-file": self.gguf_file,
            "device-map": self.device_map,
            "tensor-parallel": self.tensor_parallel,
            "trust-remote-code": self.trust_remote_code,
            "compile": self.compile,
        }
        given |= {name: getattr(self, name) != "auto" for name in ("dtype", "device")}
        wrong = [name for name, value in given.items() if value]
        if wrong:
            raise UsageError(f"--{wrong[0]} says how a teacher runs here, and this one runs at a server; leave it out")

    def _check_device_map(self) -> None:
        if self.device_map is None:
            return
        if self.compile:
            raise UsageError("a teacher that is spread over devices cannot be compiled; leave --compile out")
        if self.device != "auto":
            raise UsageError("--device-map says where the parts of the teacher run; leave --device out")
        if self.engine == "ray":
            raise UsageError("the engine ray gives a worker one GPU, and --device-map needs several; use torchrun")
        if self.engine == "local" and (self.workers or 1) > 1:
            raise UsageError(
                f"with --device-map one worker takes all GPUs of this machine, not {self.workers}; leave --workers out"
            )

    def _check_tensor_parallel(self) -> None:
        if not self.tensor_parallel:
            return
        if self.compile:
            raise UsageError("a teacher that is split over ranks cannot be compiled; leave --compile out")
        if self.engine != "torchrun":
            raise UsageError(
                "--tensor-parallel makes one teacher of all ranks that torchrun starts; add --engine torchrun"
            )
        if self.device != "auto" or self.device_map is not None:
            raise UsageError("--tensor-parallel settles where the teacher runs; leave --device and --device-map out")

    @property
    def served(self) -> bool:
        """Whether the teacher is a server's."""
        return is_url(self.teacher)

    @property
    def fields(self) -> CorpusFields:
        """What records of the corpus hold."""
        return CorpusFields(
            self.text_field,
            self.prompt_field,
            self.completion_field,
            self.messages_field,
            self.ids_field,
            self.mask_field,
        )

    @property
    def special_tokens(self) -> tuple[str, str]:
        """`bos` and `eos`, "none" instead of "auto" where documents have them already."""
        meant = {"auto": "none"} if self.fields.kind in ("messages", "ids") else {}
        return meant.get(self.bos, self.bos), meant.get(self.eos, self.eos)

    def wording_of(self, output: Output) -> Wording:
        """What a plan of `output` that differs is told in. Units' size follows from the corpus unless it is given."""
        settled = {"teacher.name": "--teacher-model"} if self.served else {}
        settled |= {"selection": "--also"} if output != self.outputs[0] else {}
        settled |= {"tokenizer": "--tokenizer"} if self.tokenizer else {}
        follows = FOLLOWS if self.unit_tokens else (*FOLLOWS, "geometry.unit_blocks")
        return Wording(SETTLED_BY | settled, follows, ABSENT)


def _place(output: Output) -> PurePath:
    return PurePath(output.url or output.root.resolve())
