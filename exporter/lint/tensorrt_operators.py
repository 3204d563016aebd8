"""What TensorRT's ONNX parser takes: operators, element types and restrictions, as data.

From onnx-tensorrt's docs/operators.md for TensorRT 10.15, with what the changelogs of 10.16, 11.0
and 11.1 add (Swish). Types are those of an operator's first input; DOUBLE is left out, because the
parser narrows it to fp32 without a word.
Restrictions that a static video graph cannot meet by chance are here; those of pooling, recurrent
and quantised layers are TensorRT's own to report.
"""

OLDEST_OPSET, NEWEST_OPSET = 9, 25  # 24 before TensorRT 11

_BY_TYPES = {
    "FLOAT FLOAT16 BFLOAT16": (
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv "
        "ConvTranspose Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool "
        "GlobalLpPool GlobalMaxPool GroupNormalization GRU Hardmax HardSigmoid HardSwish "
        "ImageScaler InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax "
        "LpNormalization LpPool LRN LSTM MatMul MaxPool MeanVarianceNormalization "
        "ParametricSoftplus PRelu QuantizeLinear RandomNormal RandomNormalLike RandomUniform "
        "RandomUniformLike Reciprocal Resize RMSNormalization RNN RotaryEmbedding Round "
        "ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh "
        "ThresholdedRelu Upsample"
    ),
    "FLOAT FLOAT16 BFLOAT16 INT32 INT64": (
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less "
        "LessOrEqual Max Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum "
        "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare "
        "Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK"
    ),
    "FLOAT FLOAT16 BFLOAT16 INT32 INT64 BOOL": (
        "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot "
        "Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze "
        "Where"
    ),
    "FLOAT FLOAT16": (
        "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression "
        "NonZero RoiAlign"
    ),
    "BOOL": "And Not Or Xor",
    "FLOAT FLOAT16 BFLOAT16 INT32 INT64 UINT8 BOOL": "Cast CastLike",
    "FLOAT FLOAT16 BFLOAT16 FLOAT8E4M3FN FLOAT4E2M1 INT4 INT32 INT64 BOOL": (
        "Constant ConstantOfShape"
    ),
    "FLOAT FLOAT16 BFLOAT16 INT8 FLOAT8E4M3FN": "Attention",
    "INT8 FLOAT8E4M3FN FLOAT4E2M1 INT4": "DequantizeLinear",
    "FLOAT FLOAT16 BFLOAT16 INT8 INT32 INT64": "Gelu",
    "FLOAT FLOAT16 BFLOAT16 FLOAT8E4M3FN INT32 INT64": "Mean",
    "FLOAT": "STFT",
    "FLOAT FLOAT16 BFLOAT16 INT32": "TensorScatter",
}
TYPES = {
    name: frozenset(types.split()) for types, names in _BY_TYPES.items() for name in names.split()
}
MOST_INPUTS = {"Attention": 4}  # q, k, v and mask: no past, nonpad_kv_seqlen
MOST_OUTPUTS = {"Attention": 1, "LayerNormalization": 1, "MaxPool": 1}
RANKS = {"Attention": 4, "GridSample": 4, "TensorScatter": 4}  # of every tensor input
# Inputs that must be constants when the engine is built, by position.
CONSTANTS = {
    **dict.fromkeys(("CumSum", "OneHot", "Squeeze", "Unsqueeze"), (1,)),
    **{name: (1,) for name in TYPES if name.startswith("Reduce")},
    "Dropout": (2,),
    "STFT": (1, 2),
}
# Attributes with the only values that are taken; None is for those that are not taken at all.
ATTRIBUTES: dict[str, dict[str, tuple[object, ...] | None]] = {
    "Attention": {"softcap": (0.0,), "qk_matmul_output_mode": (0,)},
    "Constant": dict.fromkeys(("sparse_value", "value_string", "value_strings")),
    "LSTM": {"input_forget": (0,), "layout": (0,)},
    "Resize": {
        "antialias": (0,),
        "coordinate_transformation_mode": (
            "half_pixel",
            "pytorch_half_pixel",
            "tf_half_pixel_for_nn",
            "asymmetric",
            "align_corners",
        ),
        "keep_aspect_ratio_policy": ("stretch",),
        "mode": ("nearest", "linear"),
    },
    "ScatterND": {"reduction": ("none",)},
    "TensorScatter": {"axis": (-2,)},
    "TopK": {"sorted": (1,)},
}
