// The activation of MLPs that are not experts.
#pragma once

#include "activation.h"
#include "norm.h"

namespace ISA {

template <class Element> void gated(const GatedArguments& a) {
    const Element* x = static_cast<const Element*>(a.x);
    Element* y = static_cast<Element*>(a.y);
    int64_t up_at = has_gate(a.activation) ? a.width : 0;
    by_activation(a.activation, [&](auto kind) {
        for_each_row(a.rows, threads_for(a.width, a.rows, a.threads), [&](int64_t r) {
            const Element *gate = x + r * (up_at + a.width), *up = gate + up_at;
            for (int64_t i = 0; i < a.width; i++)
                y[r * a.width + i] =
                    narrow<Element>(activate<kind>(widen(gate[i]), widen(up[i])).value);
        });
    });
}

}  // namespace ISA
