// The functions Python calls; each runs on the best instruction set this processor has.
#include <cstring>

#include "arguments.h"

// HAS_... are the instruction sets that the compiler supports.
extern const Kernels kernels_portable, kernels_avx2, kernels_avx512, kernels_avx512_bf16;

static const Kernels* chosen = &kernels_portable;

static bool can_run(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
    if (!std::strcmp(name, "avx2")) return has_avx2;
    if (!std::strcmp(name, "avx512")) return has_avx512;
    if (!std::strcmp(name, "avx512_bf16"))
        return has_avx512 && __builtin_cpu_supports("avx512bf16") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return !std::strcmp(name, "portable");
}

#define PUBLIC __attribute__((visibility("default")))

extern "C" {

// Chooses the best instruction set up to `limit` (null: of all) and returns its name.
PUBLIC const char* moeyard_choose(const char* limit) {
    const Kernels* all[] = {
        &kernels_portable,
#if defined(HAS_avx2)
        &kernels_avx2,
#endif
#if defined(HAS_avx512)
        &kernels_avx512,
#endif
#if defined(HAS_avx512_bf16)
        &kernels_avx512_bf16,
#endif
    };
    for (const Kernels* kernels : all) {
        if (can_run(kernels->name)) chosen = kernels;
        if (limit && !std::strcmp(limit, kernels->name)) break;
    }
    return chosen->name;
}

// Bytes of each structure; Python compares them with its structures.
PUBLIC const int64_t* moeyard_sizes() {
    static const int64_t sizes[] = {
        sizeof(LinearArguments),
        sizeof(NormArguments),
        sizeof(GatedArguments),
        sizeof(Biases),
        sizeof(ExpertArguments),
        sizeof(QuantizedMatrix),
        sizeof(QuantizedExpertArguments),
        sizeof(GroupSparseMatrix),
        sizeof(GroupSparseExpertArguments),
        sizeof(TwoOfFourMatrix),
        sizeof(TwoOfFourExpertArguments),
        sizeof(ChannelExpertArguments),
        sizeof(LiveChannelArguments),
        sizeof(ExpertGradArguments),
        sizeof(GroupedArguments),
        sizeof(CombineArguments),
        sizeof(RouterArguments),
        sizeof(ForetellArguments),
        sizeof(AttentionWeights),
        sizeof(CachedRows),
        sizeof(AttentionArguments),
        sizeof(AttendArguments),
        0,
    };
    return sizes;
}

PUBLIC void moeyard_linear(const LinearArguments* a) { chosen->linear(a); }
PUBLIC void moeyard_norm(const NormArguments* a) { chosen->norm(a); }
PUBLIC void moeyard_gated(const GatedArguments* a) { chosen->gated(a); }
PUBLIC int64_t moeyard_experts(const ExpertArguments* a) { return chosen->experts(a); }
PUBLIC int64_t moeyard_quantized_experts(const QuantizedExpertArguments* a) {
    return chosen->quantized_experts(a);
}
PUBLIC int64_t moeyard_group_sparse_experts(const GroupSparseExpertArguments* a) {
    return chosen->group_sparse_experts(a);
}
PUBLIC int64_t moeyard_two_of_four_experts(const TwoOfFourExpertArguments* a) {
    return chosen->two_of_four_experts(a);
}
PUBLIC int64_t moeyard_channel_experts(const ChannelExpertArguments* a) {
    return chosen->channel_experts(a);
}
PUBLIC int64_t moeyard_live_channels(const LiveChannelArguments* a) {
    return chosen->live_channels(a);
}
PUBLIC int64_t moeyard_expert_forward(const ExpertArguments* a) {
    return chosen->expert_forward(a);
}
PUBLIC void moeyard_expert_grads(const ExpertGradArguments* a) { chosen->expert_grads(a); }
PUBLIC void moeyard_grouped_product(const GroupedArguments* a) { chosen->grouped_product(a); }
PUBLIC void moeyard_grouped_product_grad(const GroupedArguments* a) {
    chosen->grouped_product_grad(a);
}
PUBLIC void moeyard_grouped_weight_grad(const GroupedArguments* a) {
    chosen->grouped_weight_grad(a);
}
PUBLIC void moeyard_combine(const CombineArguments* a) { chosen->combine(a); }
PUBLIC void moeyard_route(const RouterArguments* a) { chosen->route(a); }
PUBLIC void moeyard_foretell(const ForetellArguments* a) { chosen->foretell(a); }
PUBLIC void moeyard_attention(const AttentionWeights* w, const AttentionArguments* a) {
    chosen->attention(w, a);
}
PUBLIC void moeyard_attend(const AttendArguments* a) { chosen->attend(a); }
}
