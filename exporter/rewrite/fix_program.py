"""`wanexport lint module:function`: export, lint, and with --fix rewrite, prove and save."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import BinaryIO

import torch
from torch.export import ExportedProgram

from wanexport.exporter.child.quiet import quiet
from wanexport.exporter.lint.program import Finding, lint_program
from wanexport.exporter.module_function import call_of, returned_by
from wanexport.exporter.rewrite.proof import Proof
from wanexport.exporter.rewrite.record import RULES, Rewriting, total
from wanexport.exporter.rewrite.rewrite import apply, unknown_writes
from wanexport.runtime.bundle.durable import durable_file
from wanexport.runtime.errors import BadRequest, WanExportError, first_line, printable


def export_function(target: str) -> ExportedProgram:
    """The program of what `module:function` returns: a torch.nn.Module's, or a program itself.

    Raises BadRequest as `load_function` does, and when torch.export does not take the model.
    """
    returned = returned_by(target)
    if isinstance(returned, ExportedProgram):
        return returned
    model, args, kwargs = call_of(target, returned)
    if not isinstance(model, torch.nn.Module):
        raise BadRequest(
            f"{target} returned {type(model).__name__} as model: torch.export takes a "
            f"torch.nn.Module"
        )
    try:
        # Of a model that it does not take, PyTorch prints the graph.
        with torch.no_grad(), quiet("torch"), redirect_stderr(io.StringIO()):
            return torch.export.export(model, args, kwargs)
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {first_line(error)}", 300)
        raise BadRequest(f"torch.export does not take the model of {target}: {reason}") from error


def fix_program(program: ExportedProgram, output: Path) -> tuple[Rewriting, list[Finding], int]:
    """Rewrite a program in place, rule by rule, and save it.

    Returns the rewriting, what lint finds afterwards, and on how many inputs both were run. Raises
    WanExportError, with nothing written, when a rule changes a bit of any result.
    """
    proof = Proof(program)
    parts = []
    for rule in RULES:
        done = apply(program, rule)
        if done.counts[rule]:
            proof.check(program, rule)
        parts.append(done)
    with durable_file(output) as file, quiet("torch"):
        _save(program, file)
    return total([*parts, unknown_writes(program)]), lint_program(program), proof.runs


def _save(program: ExportedProgram, file: BinaryIO) -> None:
    """Save the program. Raises WanExportError when torch.export.save does not take it."""
    try:
        torch.export.save(program, file)
    except OSError:
        raise
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {first_line(error)}", 300)
        raise WanExportError(f"torch.export.save does not take the program: {reason}") from error
