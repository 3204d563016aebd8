"""`wanexport lint model.onnx --fix`: rewrite an ONNX file into another, and run both."""

import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir

from wanexport.exporter.lint.onnx_expansion import check_expansion
from wanexport.exporter.rewrite.onnx_graph import rewrite_onnx
from wanexport.exporter.rewrite.onnx_proof import compare
from wanexport.exporter.rewrite.record import STRIDED_WRITES, Rewriting
from wanexport.runtime.bundle.durable import durable_file
from wanexport.runtime.bundle.regular_file import open_regular, read_regular
from wanexport.runtime.errors import WanExportError, first_line, printable

_MOST_BYTES = 2**31 - 1  # of a message of protobuf


def weights_beside(output: Path) -> Path:
    """The file that takes the weights of a graph which is written to another folder."""
    return output.with_name(f"{output.name}.data")


def fix_onnx(path: Path, output: Path) -> tuple[Rewriting, str | None]:
    """Rewrite the model into output; also why the two were not compared, where they were not.

    In the folder of the original the new graph reads the original's weights file; elsewhere it has
    a copy, X.onnx.data. Raises WanExportError, with nothing written, when the file is no ONNX
    model, its weights are not in its folder, or an output of the two differs.
    """
    model, inferred = _load(path)
    rewriting = rewrite_onnx(model, inferred)
    if _external(model) and output.parent.resolve() != path.parent.resolve():
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".wanexport-") as folder:
            new = Path(folder) / output.name
            ir.save(model, new, external_data=weights_beside(output).name)
            uncompared = _compare(path, new)
            weights_beside(new).replace(weights_beside(output))
            new.replace(output)
    else:
        with durable_file(output) as file:
            file.write(ir.to_proto(model).SerializeToString())
            file.flush()
            uncompared = _compare(path, Path(file.name))
    return rewriting, uncompared


def _compare(path: Path, new: Path) -> str | None:
    """Why the two were not compared. Raises WanExportError when they differ."""
    difference, uncompared = compare(path, new)
    if difference:
        raise WanExportError(
            f"the rule {STRIDED_WRITES} changes {path}: {difference}; nothing is written"
        )
    return uncompared


def _load(path: Path) -> tuple[ir.Model, onnx.ModelProto]:
    """The model, and itself after shape inference."""
    content = read_regular(path, at_most=_MOST_BYTES)
    try:
        proto = onnx.load_model_from_string(content)
        check_expansion(proto)
        model = ir.from_proto(proto)
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except WanExportError as error:
        raise WanExportError(f"{path}: {error}") from error
    except Exception as error:  # protobuf's and onnx's exceptions have no base but this
        raise WanExportError(
            f"{path} is no ONNX file that can be read: {first_line(error)}"
        ) from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    _check_weights(model, path)
    return model, inferred


def _external(model: ir.Model) -> list[ir.ExternalTensor]:
    values = model.graph.initializers.values()
    return [v.const_value for v in values if isinstance(v.const_value, ir.ExternalTensor)]


def _check_weights(model: ir.Model, path: Path) -> None:
    """Raise WanExportError unless every weights file is a regular one in the model's folder."""
    for location in {str(tensor.location) for tensor in _external(model)}:
        if Path(location).is_absolute() or ".." in Path(location).parts:
            raise WanExportError(
                f"{path}: its weights lie outside its folder ({printable(location)}): put them "
                f"beside it"
            )
        try:
            open(open_regular(path.parent / location), "rb").close()
        except OSError as error:
            raise WanExportError(
                f"{path}: its weights {printable(location)} cannot be read ({error.strerror})"
            ) from error
