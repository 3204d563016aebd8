"""A model with waits on known lines, in two files, and what each line causes in one call."""

from pathlib import Path

MODEL = """
import threading
import torch
from planted_helper import read, scaled

class Planted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.scale = torch.tensor(2.0)

    def forward(self, x):
        x = self.linear(x)
        for index in range(3):
            x = x + x[0, index].item()  # item 3
        values = x.tolist()  # tolist 1
        if x.sum() > 1e9:  # is_nonzero 1
            return x
        found = bool(x[0, 0] > 0)  # is_nonzero 1
        places = x.nonzero()  # nonzero 1
        host = x.cpu()  # cpu 1
        first = int(x[0, 0])  # item 1
        shown = f"{x[0, 0]:.3f} {x[0, 1]}"  # item 2
        print(x[:1, :1])  # print
        table = torch.tensor([1.0, 2.0], device=x.device)  # tensor 1
        positive = x[x > 0]  # index 1
        x[x < 0] = positive.sum()  # silent: on a CPU, as with a number
        both = x[x > 0, ][:1], torch.where(x > 0, x, 0)  # index 1
        rows = x[torch.tensor(0)]  # item 1
        same = torch.equal(x, x)  # equal 1
        one, two = x[0, 0].item(), x[0, 1].item()  # item 2
        return scaled(x, read(self.scale)) + len(table)

def make():
    torch.manual_seed(0)
    return Planted(), (torch.randn(4, 4),)

class Clean(torch.nn.Module):
    def forward(self, x, *, steps):
        for _ in range(steps):
            x = torch.nn.functional.gelu(x @ x.T).softmax(-1)
        return torch.cat([x, x.to(torch.float64).to(x.dtype)])

def clean():
    return Clean(), (torch.ones(8, 8),), {"steps": 3}

def failing():
    return (lambda x: x @ x), (torch.ones(2, 3),)

def threaded():
    def step(x):
        thread = threading.Thread(target=lambda: x.sum().item())
        thread.start()
        thread.join()
        return x.exp()
    return step, (torch.ones(2, 2),)

def compiled():
    def step(x):
        y = torch.sin(x)
        if y.sum() > 1e9:  # is_nonzero
            return y
        return torch.relu(y) + 1
    return torch.compile(step, backend="eager"), (torch.ones(2, 2),)

def leaving():
    def step():
        raise SystemExit(3)
    return step, ()

def yielding():
    def steps(x):
        for _ in range(2):
            yield x.sum().item()
    return steps, (torch.ones(2, 2),)

def idle():
    return (lambda: 1 + 1), ()

def alternating():
    calls = []
    def step(x):
        calls.append(x)
        return x.sum().item() if len(calls) % 2 else x.nonzero()
    return step, (torch.ones(2, 2),)
"""
HELPER = """
def read(t):
    return float(t.sum())  # item 1

def scaled(x, factor):
    return x * factor
"""
CAUSES = {
    "item": "aten::item",
    "is_nonzero": "aten::is_nonzero",
    "nonzero": "aten::nonzero",
    "index": "aten::index",
    "equal": "aten::equal",
    "tolist": "Tensor.tolist",
    "cpu": "Tensor.cpu",
    "tensor": "torch.tensor",
}


def plant(folder: Path) -> None:
    """Write both files."""
    (folder / "planted_model.py").write_text(MODEL)
    (folder / "planted_helper.py").write_text(HELPER)


def expected() -> dict[tuple[str, str], int]:
    """How often each line has each cause in a call, from the comments on the lines."""
    found = {}
    for name, source in (("planted_model.py", MODEL), ("planted_helper.py", HELPER)):
        for number, line in enumerate(source.splitlines(), 1):
            words = line.partition("  # ")[2].split()
            if len(words) == 2:
                found[f"{name}:{number}", CAUSES[words[0]]] = int(words[1])
    return found


def printing_line() -> str:
    """The line that prints a tensor."""
    lines = MODEL.splitlines()
    return f"planted_model.py:{next(n for n, line in enumerate(lines, 1) if '# print' in line)}"
