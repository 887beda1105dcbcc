// All kernels for one instruction set, in a table.
#include "arguments.h"
#include "attention.h"
#include "channel_experts.h"
#include "expert_backward.h"
#include "expert_forward.h"
#include "experts.h"
#include "gated.h"
#include "grouped.h"
#include "linear.h"
#include "live_channels.h"
#include "norm.h"
#include "quantized_experts.h"
#include "router.h"
#include "foretell.h"
#include "two_of_four.h"

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define JOIN_OF(a, b) a##b
#define JOIN(a, b) JOIN_OF(a, b)

namespace ISA {

// Runs `kernel<float>` or `kernel<bf16>`, depending on the arguments' type.
#define BY_TYPE(kernel, type, ...) \
    ((type) == BFLOAT16 ? kernel<bf16>(__VA_ARGS__) : kernel<float>(__VA_ARGS__))

static void run_linear(const LinearArguments* a) { BY_TYPE(linear, a->type, *a); }
static void run_norm(const NormArguments* a) { BY_TYPE(norm, a->type, *a); }
static void run_gated(const GatedArguments* a) { BY_TYPE(gated, a->type, *a); }
static int64_t run_experts(const ExpertArguments* a) { return BY_TYPE(experts, a->type, *a); }
static int64_t run_quantized_experts(const QuantizedExpertArguments* a) {
    return BY_TYPE(quantized_experts, a->rest.type, *a);
}
static int64_t run_group_sparse_experts(const GroupSparseExpertArguments* a) {
    return BY_TYPE(group_sparse_experts, a->rest.type, *a);
}
static int64_t run_two_of_four_experts(const TwoOfFourExpertArguments* a) {
    return BY_TYPE(two_of_four_experts, a->rest.type, *a);
}
static int64_t run_channel_experts(const ChannelExpertArguments* a) {
    return BY_TYPE(channel_experts, a->rest.type, *a);
}
static int64_t run_live_channels(const LiveChannelArguments* a) {
    return BY_TYPE(live_channels, a->of.rest.type, *a);
}
static int64_t run_expert_forward(const ExpertArguments* a) {
    return BY_TYPE(expert_forward, a->type, *a);
}
static void run_expert_grads(const ExpertGradArguments* a) {
    BY_TYPE(expert_grads, a->forward.type, *a);
}
static void run_grouped_product(const GroupedArguments* a) {
    BY_TYPE(grouped_product, a->type, *a);
}
static void run_grouped_product_grad(const GroupedArguments* a) {
    BY_TYPE(grouped_product_grad, a->type, *a);
}
static void run_grouped_weight_grad(const GroupedArguments* a) {
    BY_TYPE(grouped_weight_grad, a->type, *a);
}
static void run_combine(const CombineArguments* a) { BY_TYPE(combine, a->type, *a); }
static void run_route(const RouterArguments* a) { BY_TYPE(route, a->type, *a); }
static void run_foretell(const ForetellArguments* a) { BY_TYPE(foretell, a->type, *a); }
static void run_attention(const AttentionWeights* w, const AttentionArguments* a) {
    BY_TYPE(attention, w->type, *w, *a);
}
static void run_attend(const AttendArguments* a) { BY_TYPE(attend, a->type, *a); }

}  // namespace ISA

extern const Kernels JOIN(kernels_, ISA);
const Kernels JOIN(kernels_, ISA) = {
    TEXT(ISA),
    ISA::run_linear,
    ISA::run_norm,
    ISA::run_gated,
    ISA::run_experts,
    ISA::run_quantized_experts,
    ISA::run_group_sparse_experts,
    ISA::run_two_of_four_experts,
    ISA::run_channel_experts,
    ISA::run_live_channels,
    ISA::run_expert_forward,
    ISA::run_expert_grads,
    ISA::run_grouped_product,
    ISA::run_grouped_product_grad,
    ISA::run_grouped_weight_grad,
    ISA::run_combine,
    ISA::run_route,
    ISA::run_foretell,
    ISA::run_attention,
    ISA::run_attend,
};
