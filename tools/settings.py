"""Settings of a training run: read from TOML, overridden by `table.key=value`, checked before anything starts."""

import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from stagein.formats.errors import UsageError

_PACKAGED = "stagein.configs"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSettings(_Table):
    """[data]: what is trained on, and how it is loaded."""

    train: Path
    """The data set, as `stagein convert` wrote it; its staged copy on the node is used where there is one."""
    test: Path | None = None
    """Validated after every epoch; none: no validation."""
    global_batch_size: int = Field(128, ge=1)
    """Images in one step of all ranks together; a multiple of the number of ranks."""
    image_size: int = Field(224, ge=8)
    """Pixels, height and width, that images are resized to."""
    test_resize: int | None = Field(None, ge=8)
    """Pixels of the shorter side before the test images are cropped; none: image_size, nothing is cropped away."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image that a random training crop takes."""
    workers: int = Field(2, ge=0)
    """Reader threads of each rank."""
    seed: int = 0


class ModelSettings(_Table):
    """[model]: one of `stagein.train.models.MODELS`; the number of classes is that of the data set."""

    name: str = "small"


class OptimSettings(_Table):
    """[optim]: how it learns. Rates are those of the whole global batch."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of sgd, with Nesterov's step."""
    weight_decay: float = Field(5e-4, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    clip_norm: float | None = Field(None, gt=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_epochs: float = Field(0.0, ge=0)
    epochs: int = Field(10, ge=1)
    target_accuracy: float | None = Field(None, gt=0, le=1)
    """Training ends after the epoch whose test accuracy reaches this."""


class TrainSettings(_Table):
    """[train]: how it runs."""

    backend: Literal["auto", "single", "mpi", "gloo", "nccl"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulate: int = Field(1, ge=1)
    """Global batches that make one optimizer step."""
    checkpoint_folder: Path | None = None
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Between the checkpoints at the end of every epoch."""
    keep_checkpoints: int = Field(2, ge=1)
    run_folder: Path | None = None
    """Where log.jsonl and summary.json go."""
    log_every_steps: int = Field(50, ge=1)

    @model_validator(mode="after")
    def _checkpoints_have_a_folder(self) -> Self:
        if self.checkpoint_every_steps is not None and self.checkpoint_folder is None:
            raise ValueError("checkpoint_every_steps needs a checkpoint_folder, without which nothing is saved")
        return self


class Settings(_Table):
    """All tables of a settings file."""

    data: DataSettings
    model: ModelSettings = ModelSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()

    @model_validator(mode="after")
    def _a_target_is_tested(self) -> Self:
        if self.optim.target_accuracy is not None and self.data.test is None:
            raise ValueError("optim.target_accuracy needs data.test, on which it is reached")
        return self


def load_settings(config: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """The settings in `config`, a TOML file or the name of a packaged one, changed by `overrides` ("table.key=value").

    A value is read as TOML where it is TOML, and as a string otherwise: `optim.lr=0.2`, `data.train=/scratch/set`.
    Raises UsageError, one sentence, for what cannot be found or read, for unknown keys and for values that do not fit.
    """
    tables = _read_tables(config)
    for override in overrides:
        _apply_override(tables, override)
    try:
        return Settings.model_validate(tables)
    except ValidationError as error:
        # a typo comes first: it also leaves missing what it meant
        wrong = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        raise UsageError(f"{config}: {_sentence(wrong)}") from None


def _read_tables(config: str | Path) -> dict[str, Any]:
    path = Path(config)
    packaged = resources.files(_PACKAGED).joinpath(f"{config}.toml")
    try:
        text = path.read_text() if path.suffix == ".toml" or not packaged.is_file() else packaged.read_text()
        return tomllib.loads(text)
    except OSError as error:
        names = sorted(
            each.name.removesuffix(".toml")
            for each in resources.files(_PACKAGED).iterdir()
            if each.name.endswith(".toml")
        )
        raise UsageError(
            f"the settings {config} cannot be read ({error.strerror}): give a TOML file, or one of {', '.join(names)}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{config} is not TOML: {error}") from None


def _apply_override(tables: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    table, dot, name = key.strip().partition(".")
    if not (equals and dot and table and name):
        raise UsageError(f"--set {override!r} is not of the form table.key=value, such as optim.lr=0.2")
    values = tables.setdefault(table, {})
    if not isinstance(values, dict):
        raise UsageError(f"--set {override!r} needs a table [{table}], but the settings file has a value of that name")
    values[name] = _parse_value(text.strip())


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _sentence(error: ErrorDetails) -> str:
    """What pydantic found wrong, in our words."""
    where = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "missing" if isinstance(error["loc"][-1], int):
            return f"{'.'.join(map(str, error['loc'][:-1]))} = {error['input']!r} does not fit: it has too few values"
        case "path_type":
            return f"{where} = {error['input']!r} is not a path: write it in quotes"
        case "value_error":
            return f"{where}: {error['msg']}".removeprefix(": ").replace("Value error, ", "", 1)
        case "extra_forbidden":
            return f"there is no setting {where}: known are {', '.join(_known_names(error['loc'][:-1]))}"
        case "missing":
            return f"{where} is missing: put it in the file, or add --set {where if '.' in where else where + '.KEY'}=VALUE"
        case _:
            return f"{where} = {error['input']!r} does not fit: {error['msg'][0].lower()}{error['msg'][1:]}"


def _known_names(tables: tuple[int | str, ...]) -> list[str]:
    """Keys of the table that this path leads to; tables in brackets at the top."""
    if not tables:
        return [f"[{name}]" for name in Settings.model_fields]
    annotation = Settings.model_fields[str(tables[0])].annotation
    models = [
        each for each in (annotation, *get_args(annotation)) if isinstance(each, type) and issubclass(each, BaseModel)
    ]
    return list(models[0].model_fields)
