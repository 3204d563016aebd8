"""Which instructions the machine code in a package has, by disassembling it."""

import re
import subprocess
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

# What GCC gives an x86-64-v4 processor no leave to use, by mnemonic: newer vector instructions,
# matrix tiles, and the odd ones that -march=native brings in.
_NEWER = re.compile(
    r"v?(pdp(bu|bs|wu|ws)|dpbf16|cvtne(2?)ps2?bf16|p2intersect|permi?2?t?2?b$|pmultishiftqb|"
    r"pexpand[bw]|pcompress[bw]|pshld|pshrd|popcnt[bwdq]$|pshufbitqmb|pmadd52|gf2p8|aes|pclmul|"
    r"sha1|sha256|fmadd\w*ph$|cvt\w*ph2?(dq|qq|w|uw|udq|uqq)$|(add|sub|mul|div|sqrt|max|min)[ps]h$)|"
    r"vmov(w|sh)$|tile|tdp|ldtilecfg|sttilecfg|adcx|adox|rdseed|rdrand|xbegin|xend|xtest|rdpid|"
    r"movdir|cldemote|serialize|clwb|clflushopt|vpdpbusd"
)
_WIDE = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|\{%k\d|%k[0-7]\b")  # AVX-512's encoding


def beyond(package: Path, level: str) -> Counter[str]:
    """The instructions in a package's code, by mnemonic, that `x86-64-v3` or `-v4` has not."""
    found: Counter[str] = Counter()
    with zipfile.ZipFile(package) as archive, tempfile.TemporaryDirectory() as folder:
        for name in archive.namelist():
            if not name.endswith(".so"):
                continue
            code = subprocess.run(
                ["objdump", "-d", "--no-show-raw-insn", archive.extract(name, folder)],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
            for line in code.splitlines():
                _, _, instruction = line.partition("\t")
                mnemonic = instruction.split(" ")[0].strip()
                if _NEWER.match(mnemonic) or (level == "x86-64-v3" and _WIDE.search(instruction)):
                    found[mnemonic] += 1
    return found


def compiled_for(package: Path) -> set[str]:
    """The processors that the compiler was told, as Inductor notes them in the package."""
    with zipfile.ZipFile(package) as archive:
        texts = [archive.read(name).decode(errors="replace") for name in archive.namelist()]
    return {processor for text in texts for processor in re.findall(r"-march=([\w-]+)", text)}
