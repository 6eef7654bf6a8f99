// Norm over a head, weight, and RoPE of halves, in fp32: each row [D] is read once, in forward and in backward.
//
// The compiler goes over a row two or three times, and writes down the gradient it has turned back.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

struct Side {
    const float *x;         // [B, T, H, D]; in the backward what was kept: x, or y of a weightless side
    const float *grad;      // [B, T, H, D], backward only
    const float *weight;    // [D] or null
    const float *cos, *sin; // [T, R/2] or null; sin already has the sign of the rotation
    const float *undo;      // [T, D]: what makes the transposed rotation the inverse one; backward from y only
    float *y;               // [B, T, H, D], contiguous: y, or the gradient of x
    float *inverse;         // [B, T, H], contiguous: 1/root, written by the forward
    float *weight_grad;     // [D] or null
    int64_t B, T, H, D, half;             // half = R/2
    int64_t xb, xt, xh, gb, gt, gh;       // strides in floats; the last dim is contiguous
    float eps, divisor, offset;           // divisor: D for a mean, 1 for a sum; offset: 1 for a zero-centred weight
};

namespace {

constexpr int64_t MAX_D = 512, BLOCK = 64;

float factor(const Side &s, int64_t i) { return s.weight == nullptr ? 1.0f : s.weight[i] + s.offset; }

// Rows are shared out by position, so that every thread sums the same rows whatever the machine does.
template <class Row> void each_row(const Side &s, int threads, Row row) {
    const int64_t positions = s.B * s.T;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < positions; ++p)
        for (int64_t h = 0; h < s.H; ++h) row(p / s.T, p % s.T, h, (p * s.H + h));
}

void forward(const Side &s, int threads) {
    float w[MAX_D];
    for (int64_t i = 0; i < s.D; ++i) w[i] = factor(s, i);
    each_row(s, threads, [&](int64_t b, int64_t t, int64_t h, int64_t n) {
        const float *x = s.x + b * s.xb + t * s.xt + h * s.xh;
        float *y = s.y + n * s.D;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < s.D; ++i) sum += x[i] * x[i];
        const float r = 1 / std::sqrt(sum / s.divisor + s.eps);
        s.inverse[n] = r;
        const float *c = s.cos + t * s.half, *d = s.sin + t * s.half;
        const int64_t half = s.half;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
            const float a = x[i] * r * w[i], e = x[i + half] * r * w[i + half];
            y[i] = a * c[i] - e * d[i];
            y[i + half] = e * c[i] + a * d[i];
        }
#pragma omp simd
        for (int64_t i = 2 * half; i < s.D; ++i) y[i] = x[i] * r * w[i];
    });
}

// With g turned back, u = g w and x̂ = x r: dw = Σ g x̂, dx = r (u - x̂ · Σ(u x̂) / divisor).
void backward(const Side &s, int threads) {
    float w[MAX_D];
    for (int64_t i = 0; i < s.D; ++i) w[i] = factor(s, i);
    const int64_t blocks = (s.B * s.T + BLOCK - 1) / BLOCK, half = s.half;
    std::vector<float> sums(s.weight_grad == nullptr ? 0 : blocks * s.D, 0.0f);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < blocks; ++block) {
        float dw[MAX_D] = {}, g[MAX_D], z[MAX_D];
        const int64_t end = std::min((block + 1) * BLOCK, s.B * s.T);
        for (int64_t p = block * BLOCK; p < end; ++p) {
            const int64_t b = p / s.T, t = p % s.T;
            const float *c = s.cos + t * half, *d = s.sin + t * half;
            for (int64_t h = 0; h < s.H; ++h) {
                const int64_t n = p * s.H + h;
                const float *x = s.x + b * s.xb + t * s.xt + h * s.xh;
                const float *grad = s.grad + b * s.gb + t * s.gt + h * s.gh;
                const float r = s.inverse[n];
#pragma omp simd
                for (int64_t i = 0; i < half; ++i) {
                    g[i] = grad[i] * c[i] + grad[i + half] * d[i];
                    g[i + half] = grad[i + half] * c[i] - grad[i] * d[i];
                }
#pragma omp simd
                for (int64_t i = 2 * half; i < s.D; ++i) g[i] = grad[i];
                if (s.undo == nullptr) {
#pragma omp simd
                    for (int64_t i = 0; i < s.D; ++i) z[i] = x[i] * r;
                } else {
                    const float *undo = s.undo + t * s.D;
#pragma omp simd
                    for (int64_t i = 0; i < half; ++i) {
                        const float a = x[i] * undo[i], e = x[i + half] * undo[i + half];
                        z[i] = a * c[i] + e * d[i];
                        z[i + half] = e * c[i] - a * d[i];
                    }
#pragma omp simd
                    for (int64_t i = 2 * half; i < s.D; ++i) z[i] = x[i];
                }
                float along = 0;
#pragma omp simd reduction(+ : along)
                for (int64_t i = 0; i < s.D; ++i) {
                    dw[i] += g[i] * z[i];
                    g[i] *= w[i];
                    along += g[i] * z[i];
                }
                along /= s.divisor;
                float *dx = s.y + n * s.D;
#pragma omp simd
                for (int64_t i = 0; i < s.D; ++i) dx[i] = r * (g[i] - z[i] * along);
            }
        }
        if (s.weight_grad != nullptr)
            for (int64_t i = 0; i < s.D; ++i) sums[block * s.D + i] = dw[i];
    }
    if (s.weight_grad == nullptr) return;
    for (int64_t i = 0; i < s.D; ++i) {
        double total = 0;
        for (int64_t block = 0; block < blocks; ++block) total += sums[block * s.D + i];
        s.weight_grad[i] = static_cast<float>(total);
    }
}

} // namespace

extern "C" void qk_norm_rope(const Side *sides, int64_t count, int is_backward, int threads) {
    for (int64_t i = 0; i < count; ++i) is_backward ? backward(sides[i], threads) : forward(sides[i], threads);
}
