// The arguments Python passes: plain structures, mirrored by kernels/cpu/structures.py.
#pragma once

#include <cstdint>

enum ElementType : int64_t { FLOAT32 = 0, BFLOAT16 = 1 };
enum Activation : int64_t { SWIGLU, REGLU, GEGLU, CLAMPED_SWIGLU, RELU, GELU };  // from 0 on

// Whether fc1 has gate rows in front of the up rows: H = 2F rows instead of F.
constexpr bool has_gate(int64_t activation) { return activation != RELU && activation != GELU; }
enum Score : int64_t { SOFTMAX = 0, SIGMOID = 1 };

// y = x w^T. x [rows, width] and w [outputs, width] in `type`; y [rows, outputs].
struct LinearArguments {
    int64_t type, rows, width, outputs, threads;
    const void *x, *weight;
    void* y;
};

// y = weight * x / rms(x). x and y [rows, width].
struct NormArguments {
    int64_t type, rows, width, threads;
    float epsilon;
    const void *x, *weight;
    void* y;
};

// y = act(gate) * factor(up) of rows [gate, up], or act(up). x [rows, H], y [rows, width = F].
struct GatedArguments {
    int64_t type, activation, rows, width, threads;
    const void* x;
    void* y;
};

// A bias for every slot, each one dense; null values = none.
struct Biases {
    int64_t type, stride;
    const void* values;
};

// The expert MLP of some experts: lines[t * K + k] = MLP_{experts[t][k]}(x[t]).
struct ExpertArguments {
    int64_t type, activation, tokens, choices, d_model, d_expert, num_experts, threads;
    int64_t fc1_stride, fc2_stride;  // elements from one slot to the next
    int64_t is_wave;                 // other experts' rows are skipped; else they are an error
    const void *x, *fc1, *fc2;
    const int32_t* experts;  // [T, K], -1 = none
    const int32_t* slot_of;  // [E], -1 = not here; null = slot e holds expert e
    float* lines;            // [T * K, D]; null = only `hidden` is wanted
    void* hidden;            // [T * K, H] of fc1, rows in expert order; training only
    Biases fc1_bias, fc2_bias;  // [S, H], [S, D]; in `type` for training

    int64_t fc1_rows() const { return has_gate(activation) ? 2 * d_expert : d_expert; }  // H
};

// Weights of 8 or 4 bits: bytes [S, outputs, width * bits / 8], bf16 scales [S, outputs, groups].
struct QuantizedMatrix {
    const void *values, *scales;
    int64_t bits, group;           // inputs that share a scale
    int64_t stride, scale_stride;  // bytes and scales from one slot to the next
};

// The expert MLP of quantized experts; fc1 and fc2 of `rest` are not used.
struct QuantizedExpertArguments {
    ExpertArguments rest;
    QuantizedMatrix fc1, fc2;
};

// Weights of 4 bits in the groups that each row keeps: bytes [S, outputs, kept * 16], columns and
// bf16 scales [S, outputs, kept]. Columns are uint8 or int16.
struct GroupSparseMatrix {
    const void *values, *columns, *scales;
    int64_t kept, column_bytes;
    int64_t value_stride, column_stride, scale_stride;  // elements from one slot to the next
};

// The expert MLP of group-sparse experts; fc1 and fc2 of `rest` are not used.
struct GroupSparseExpertArguments {
    ExpertArguments rest;
    GroupSparseMatrix fc1, fc2;
};

// Weights of which two of four inputs are stored: bf16 [S, outputs, width / 2], and bytes of places
// [S, outputs, width / 8].
struct TwoOfFourMatrix {
    const void *values, *places;
    int64_t value_stride, place_stride;  // elements from one slot to the next
};

// The expert MLP of 2:4 experts; fc1 and fc2 of `rest` are not used.
struct TwoOfFourExpertArguments {
    ExpertArguments rest;
    TwoOfFourMatrix fc1, fc2;
};

// The expert MLP of experts with channels that are not read where they count as 0.
struct ChannelExpertArguments {
    ExpertArguments rest;  // fc1 [S, H, D], or [S, D, H] if `by_input`; fc2 [S, F, D]
    int64_t by_input;
    // [E, D] of x, [E, F] of act(gate) and of act(gate) * up: below or at it counts as 0. Null = none.
    const float *x_limits, *gate_limits, *act_limits;
    const bool* used;  // [T * K, F]: other channels of a routed row count as 0; null = all are used
    void* act;         // [T * K, F] in `type`, what goes into fc2; null = it is not wanted
};

// Which channels of the experts with a slot some row needs, judged by gate rows alone.
struct LiveChannelArguments {
    ChannelExpertArguments of;  // fc2 and the up rows of fc1 are not read; nor x and act limits
    const int32_t* line_of;     // [E]: an expert's line of `live`
    uint8_t* live;              // [lines, F], 0 at first; 1 where a row needs the channel
};

// Gradients of the expert MLP's sum y[t] = sum_k weights[t][k] * MLP_{experts[t][k]}(x[t]).
struct ExpertGradArguments {
    ExpertArguments forward;  // as in forward; `lines` is scratch
    const void* grad;         // [T, D]: of y
    const float* weights;     // [T, K]
    int64_t is_empty;         // write the gradients of the parameters instead of adding to them
    int64_t num_slots;
    int64_t grad_type;  // of the parameters' gradients; bf16 only where they are written
    void *grad_fc1, *grad_fc2;            // [S, H, D], [S, D, F], dense; null = not wanted
    void *grad_fc1_bias, *grad_fc2_bias;  // [S, H], [S, D]; null = not wanted
    float* grad_weights;                  // [T, K]
};

// The rows of a slot, [from, to).
struct Span {
    int64_t from, to;
};

// One matrix W for every slot, and rows sorted by slot: y = x W^T and its gradients.
struct GroupedArguments {
    int64_t type, num_slots, inputs, outputs, threads;
    int64_t weight_stride;       // elements from one slot to the next
    int64_t x_stride, y_stride;  // elements from one row to the next
    const Span* spans;           // [S]
    void *x, *y, *weights;       // [N, inputs], [N, outputs], [S, outputs, inputs]
};

// out[t] = sum_k weights[t][k] * lines[t * K + k], in k order, without choices of -1.
struct CombineArguments {
    int64_t type, tokens, choices, d_model, threads;
    const float *lines, *weights;  // null weights = 1
    const int32_t* experts;
    void* out;
};

// Scores, choice and weights of a top-k router; all in fp32.
struct RouterArguments {
    int64_t type, tokens, d_model, num_experts, choices, score, renormalize, num_groups, top_groups;
    int64_t group_best;  // a group is ranked by the sum of this many of its best scores
    int64_t threads;
    float scale, epsilon;
    const void* x;            // [T, D]
    const float* weight;      // [E, D]
    const float* logit_bias;  // [E] added to the logits; null = none
    const float* bias;        // [E] added to the scores to choose by; null = none
    const int32_t* given;     // [T, K] experts to weigh, -1 = none; null = choose
    int32_t* experts;  // [T, K], best first, or as given
    float* weights;    // [T, K]
    int64_t* counts;   // [E]
};

// The experts that the routers of S layers would choose: best and their chances, for reading ahead.
struct ForetellArguments {
    int64_t type, tokens, d_model, layers, num_experts, choices, named, is_sigmoid, threads;
    float sharpness;
    const void *x, *weight;           // [T, D], [S * E, D]
    const float *bias, *corrections;  // [S, E] added to the logits, and to sigmoid scores
    int32_t* experts;  // [T, S, named], best first
    float* chances;
};

// One layer's attention, the same for every step. Null = the model does not have it.
struct AttentionWeights {
    int64_t type, d_model, num_heads, num_kv_heads, head_dim;
    int64_t window;       // positions a query sees, its own included; 0 = all
    int64_t norms_heads;  // q_norm and k_norm are [head_dim]; else over all heads together
    int64_t rotates;      // else cosines and sines are not used
    float epsilon;
    float scale;  // of scores; above 0
    float clip;   // largest magnitude of queries, keys and values; 0 = any
    const void *input_norm, *q, *k, *v, *o, *output_norm;
    const void *q_norm, *k_norm;
    const void *q_bias, *k_bias, *v_bias, *o_bias;
    const void* sinks;  // [num_heads]: logits that take probability but have no value
};

// Positions in a block of keys and values.
constexpr int64_t KV_BLOCK = 16;

// The memory of keys and values of some sequences, of which each adds rows.
struct CachedRows {
    int64_t sequences, rows;
    // By sequence: addresses for each layer of keys and of values, [G, capacity, width]; then, where
    // they are int8, of the fp32 scales of both, [G, capacity].
    void* const* const* caches;
    const int64_t* const* tables;  // by sequence: the block of each KV_BLOCK positions
    // [B]: positions stored before, rows to add, positions in a head's memory, and whether int8.
    const int64_t *lengths, *counts, *capacities, *are_int8;
};

// A layer's attention with what is around it, for all rows of some sequences.
struct AttentionArguments {
    const CachedRows* to;
    int64_t layer, threads;
    const void* x;              // [T, D]: the residual stream
    const void *cosine, *sine;  // [T, head_dim]
    void *x_out, *normed;       // [T, D]: the residual stream after, and its norm
};

// Attention alone, of finished queries, keys and values.
struct AttendArguments {
    const CachedRows* to;
    int64_t layer, threads, type, num_heads, num_kv_heads, key_width, value_width;
    int64_t values_in_keys;  // a value is the first part of the key, and v is not read
    int64_t window;          // as in AttentionWeights
    float scale;
    const void *q, *k, *v;  // [T, Q, key_width], [T, G, key_width], [T, G, value_width]
    const void* sinks;
    void* out;  // [T, Q, value_width]
};

struct Kernels {
    const char* name;
    void (*linear)(const LinearArguments*);
    void (*norm)(const NormArguments*);
    void (*gated)(const GatedArguments*);
    int64_t (*experts)(const ExpertArguments*);
    int64_t (*quantized_experts)(const QuantizedExpertArguments*);
    int64_t (*group_sparse_experts)(const GroupSparseExpertArguments*);
    int64_t (*two_of_four_experts)(const TwoOfFourExpertArguments*);
    int64_t (*channel_experts)(const ChannelExpertArguments*);
    int64_t (*live_channels)(const LiveChannelArguments*);
    int64_t (*expert_forward)(const ExpertArguments*);
    void (*expert_grads)(const ExpertGradArguments*);
    void (*grouped_product)(const GroupedArguments*);
    void (*grouped_product_grad)(const GroupedArguments*);
    void (*grouped_weight_grad)(const GroupedArguments*);
    void (*combine)(const CombineArguments*);
    void (*route)(const RouterArguments*);
    void (*foretell)(const ForetellArguments*);
    void (*attention)(const AttentionWeights*, const AttentionArguments*);
    void (*attend)(const AttendArguments*);
};
