// Activations, act(gate) * factor(up) or act(up), and their slopes.
#pragma once

#include <cmath>
#include <type_traits>

#include "arguments.h"
#include "vectors.h"

namespace ISA {

// gpt-oss's constants.
constexpr float CLAMP = 7.0f, CLAMPED_SLOPE = 1.702f;

// Calls body with the activation as a constant, so that its loops are vectorized.
template <class Body> inline void by_activation(int64_t activation, Body body) {
    if (activation == REGLU) return body(std::integral_constant<Activation, REGLU>{});
    if (activation == GEGLU) return body(std::integral_constant<Activation, GEGLU>{});
    if (activation == CLAMPED_SWIGLU)
        return body(std::integral_constant<Activation, CLAMPED_SWIGLU>{});
    if (activation == RELU) return body(std::integral_constant<Activation, RELU>{});
    if (activation == GELU) return body(std::integral_constant<Activation, GELU>{});
    body(std::integral_constant<Activation, SWIGLU>{});
}

struct Activated {
    float value, gate_slope, up_slope;
};

// Without a gate `gate` is the only value there is, and `up` is not read.
template <Activation Kind> inline Activated activate(float gate, float up) {
    if constexpr (Kind == RELU) return {gate > 0 ? gate : 0.0f, gate > 0 ? 1.0f : 0.0f, 0.0f};
    if constexpr (Kind == GELU) {
        Activated gated = activate<GEGLU>(gate, 1.0f);
        return {gated.value, gated.gate_slope, 0.0f};
    }
    if constexpr (Kind == REGLU) {
        float act = gate > 0 ? gate : 0.0f;
        return {act * up, gate > 0 ? up : 0.0f, act};
    }
    if constexpr (Kind == GEGLU) {
        float below = 0.5f * (1 + std::erf(gate * 0.70710678f));
        float slope = below + gate * 0.39894228f * exponential(-0.5f * gate * gate);
        return {gate * below * up, slope * up, gate * below};
    }
    if constexpr (Kind == CLAMPED_SWIGLU) {
        float g = gate < CLAMP ? gate : CLAMP, u = up < CLAMP ? up : CLAMP;
        float factor = (u > -CLAMP ? u : -CLAMP) + 1;
        float sigmoid = 1 / (1 + exponential(-CLAMPED_SLOPE * g)), act = g * sigmoid;
        float slope = sigmoid + CLAMPED_SLOPE * act * (1 - sigmoid);
        return {act * factor, gate <= CLAMP ? slope * factor : 0.0f,
                up <= CLAMP && up >= -CLAMP ? act : 0.0f};
    }
    float sigmoid = 1 / (1 + exponential(-gate)), act = gate * sigmoid;
    return {act * up, sigmoid * (1 + gate * (1 - sigmoid)) * up, act};
}

// act(gate): what up, or up + 1, is multiplied by.
template <Activation Kind> inline float gate_factor(float gate) {
    return activate<Kind>(gate, Kind == CLAMPED_SWIGLU ? 0.0f : 1.0f).value;
}

}  // namespace ISA
