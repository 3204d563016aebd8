"""The kind of work is told by a kernel's, an operator's or a node's name."""

import pytest

from wanexport.exporter.trace.kinds import kind_of

KINDS = {
    "products": [
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN",
        "sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x32",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64>(Params)",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, float>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>",
        "sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc",
        "triton_tem_fused_addmm_0",
        "aten::addmm", "aten::linear", "aten::mkldnn_convolution", "aten::conv3d", "aten::bmm",
        "onnx::MatMul", "onnx::Gemm", "onnx::Conv", "onnx::MatMulNBits",
    ],
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128",
        "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object",
        "_gemm_mha_v2_0x1f2e", "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::scaled_dot_product_attention", "wanexport::attention",
        "onnx::Attention", "onnx::MultiHeadAttention",
    ],
    "elementwise": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
        "void at::native::unrolled_elementwise_kernel<at::native::GeluCUDAKernelImpl>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10>",
        "void at::native::index_elementwise_kernel<128, 4, gpu_index_kernel>",
        "triton_poi_fused_add_mul_3",
        "triton_red_fused__to_copy_add_attention_mean_mul_pow_rsqrt_view_1",
        "triton_poi_fused_cat_mm_0", "triton_red_fused_native_layer_norm_1", "triton_per_fused_0",
        "_norm_kernel_0", "_rms_rope_kernel_1", "__myl_MulAddCast_0x9a",
        "aten::gelu", "aten::mul_", "aten::native_layer_norm", "aten::sum", "aten::sin",
        "onnx::Add", "onnx::RMSNormalization", "onnx::QuickGelu", "onnx::Softmax",
    ],
    "copies": [
        "Memcpy DtoH (Device -> Pageable)", "Memcpy DtoD (Device -> Device)",
        "Memset (Device)", "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float>",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
        "aten::copy_", "aten::cat", "aten::_to_copy", "aten::fill_",
        "onnx::Concat", "onnx::Transpose", "onnx::Slice",
    ],
    "collectives": [
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclKernel_AllGather_RING_LL_Sum_int8_t", "nccl:all_reduce", "c10d::allreduce_",
        "onnx::AllReduce",
    ],
    "other": [
        "aten::view", "aten::transpose", "aten::as_strided", "aten::empty", "aten::item",
        "aten::no_such_operator", "onnx::Reshape", "onnx::Unsqueeze", "my_kernel",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in KINDS.items() for name in names]
)
def test_a_name_has_the_kind_of_its_work(kind: str, name: str) -> None:
    assert kind_of(name) == kind
