"""The negative prompts of Wan's families, which a run uses unless it is given another.

Text: Wan-Video/Wan2.1 and Wan2.2, `sample_neg_prompt` of `wan/configs`.
"""

from wanexport.runtime.bundle.manifest import EngineRecord

_COMMA = "\uff0c"  # the full-width one of Chinese text
_NEGATIVE = (  # of every family: garish colours, overexposure, stills, subtitles, bad hands...
    "色调艳丽", "过曝", "静态", "细节模糊不清", "字幕", "风格", "作品", "画作", "画面", "静止",
    "整体发灰", "最差质量", "低质量", "JPEG压缩残留", "丑陋的", "残缺的", "多余的手指",
    "画得不好的手部", "画得不好的脸部", "畸形的", "毁容的", "形态畸形的肢体", "手指融合",
    "静止不动的画面", "杂乱的背景", "三条腿", "背景人很多", "倒着走",
)  # fmt: skip
_SHAKING, _CUTS = "镜头晃动", "镜头切换"  # of the camera; between shots
# number of CLIP tokens, which tells Wan2.1's image-to-video models from others -> what comes first
_FIRST = {257: (_SHAKING,), 514: (_CUTS, _SHAKING)}


def negative_prompt(record: EngineRecord) -> str:
    """The official negative prompt of the family whose engine this is."""
    image = record.inputs.get("image")
    first = () if image is None else _FIRST.get(image.shape[1], ())
    return _COMMA.join((*first, *_NEGATIVE))
