"""A trained network for other programs: files that need neither this library nor the class of the network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedloom.errors import UsageError, unknown
from fedloom.nets import recipes

ENDINGS = {"torchscript": ".pt", "torch-export": ".pt2", "onnx": ".onnx", "peft": ""}
Recipe: TypeAlias = Mapping[str, Any] | None


def example_of(recipe: Recipe, rows: int) -> Tensor:
    """Inputs [rows, ...] such as a network of a recipe reads: all rows differ."""
    if recipe is None:
        raise UsageError(
            "the network was made in Python, and what it reads is not known; give an example: run.export(to, "
            "example=inputs), with at least two rows"
        )
    return recipes.example(recipe, rows)


def export(net: nn.Module, to: str, path: Path, example: Tensor | None, recipe: Recipe = None) -> None:
    """Writes a network as `to`: torchscript, torch-export, onnx, or the folder of a PEFT adapter.

    What was written is loaded and compared with the network before it has its name. Raises UsageError for what the
    network cannot be exported to.
    """
    if to not in ENDINGS:
        raise unknown("form of a model", to, ENDINGS)
    if path.exists():
        raise UsageError(f"{path} exists; choose another --out")
    if to == "peft":
        _peft(net, path, recipe)
        return
    example = example_of(recipe, 2) if example is None else example
    if len(example) < 2:
        raise UsageError(f"the example has {len(example)} rows; give at least two, so that their number stays open")
    writers: dict[str, Callable[[nn.Module, Path, Tensor], Callable[[Tensor], Tensor]]] = {
        "torchscript": _torchscript,
        "torch-export": _torch_export,
        "onnx": _onnx,
    }
    aside = path.with_name(f".partial-{path.name}")
    try:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # a fused kernel that no other program has
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                loaded = writers[to](net, aside, example)
                for rows in (example, torch.cat([example, example])):
                    require_close(loaded(rows), net(rows))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        aside.replace(path)
    except UsageError:
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        why = f"{type(error).__name__}: {told}"
        raise UsageError(f"the network cannot be exported to {to} ({why}); take another form") from error
    finally:
        aside.unlink(missing_ok=True)


def require_close(found: Tensor, expected: Tensor) -> None:
    """Raises AssertionError unless what was exported gives the network's outputs, up to rounding."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _torchscript(net: nn.Module, path: Path, example: Tensor) -> Callable[[Tensor], Tensor]:
    with path.open("wb") as file:  # by its name it takes no file that is hidden
        torch.jit.save(torch.jit.trace(net, example, check_trace=False), file)
    with path.open("rb") as file:
        loaded: Callable[[Tensor], Tensor] = torch.jit.load(file)
    return loaded


def _torch_export(net: nn.Module, path: Path, example: Tensor) -> Callable[[Tensor], Tensor]:
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(net, (example,), dynamic_shapes=(batch,))
    with path.open("wb") as file:
        torch.export.save(program, file)
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _onnx(net: nn.Module, path: Path, example: Tensor) -> Callable[[Tensor], Tensor]:
    if lacking := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise UsageError(f'--to onnx needs {" and ".join(lacking)}: pip install "fedloom[onnx]"')
    import onnxruntime

    batch = {0: torch.export.Dim("batch", min=1)}
    torch.onnx.export(
        *(net, (example,), str(path)),
        input_names=["inputs"], output_names=["outputs"], dynamic_shapes=(batch,), external_data=False, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"inputs": x.numpy()})[0])


def _peft(net: nn.Module, path: Path, recipe: Recipe) -> None:
    """The adapter as PEFT saves one, for `PeftModel.from_pretrained`, and the head in a file beside it."""
    if recipe is None or recipe["kind"] != "pretrained" or recipe["tuned"] != "lora":
        raise UsageError("--to peft is for low-rank adapters; this network has none: train with problem=finetune:lora")
    import peft

    from fedloom.nets.pretrained import pretrained

    encoder: Any = net.get_submodule("body.encoder")
    adapter = {
        f"base_model.model.{name.replace('.default.', '.')}": value.clone().contiguous()
        for name, value in encoder.state_dict().items()
        if "lora_" in name
    }
    path.mkdir(parents=True)
    config = copy.copy(encoder.peft_config["default"])
    config.base_model_name_or_path = recipe["model"]
    config.save_pretrained(str(path))
    save_file(adapter, path / "adapter_model.safetensors")
    head = {f"head.{name}": value.clone() for name, value in net.get_submodule("head").state_dict().items()}
    save_file(head, path / "head.safetensors")
    form = {name: recipe[name] for name in ("vocabulary", "length", "seed", "speaking", "layers")}
    base = copy.deepcopy(pretrained(recipe["model"], **form).body)
    tokens = torch.ones(2, recipe["length"], dtype=torch.int64)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT's wrapper asks for what transformers has deprecated
        loaded = peft.PeftModel.from_pretrained(base, str(path)).eval()
        found, expected = (one(input_ids=tokens).last_hidden_state for one in (loaded, encoder))
    require_close(found, expected)
