// AdamW, and the projection of each matrix onto the sphere, in one pass over the memory.
//
// The arithmetic of the step is that of torch's fused CPU kernel, operation by operation (build it with
// -ffp-contract=off), so that weights that are not on the sphere, and both moments, come out with the same bits.
// No two tasks share a sum: the result does not depend on the number of threads.

#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// One tensor, seen as [rows, cols] in row-major order.
struct Tensor {
    float* w;
    const float* g;
    float* m;
    float* v;
    int64_t rows, cols;
    int64_t dim;  // 1: rows get norm 1; 0: columns do; -1: neither
    float step_size, bias_correction2_sqrt;
};

struct Constants {
    float decay, one_minus_beta1, beta2, one_minus_beta2, eps;
};

struct Task {
    const Tensor* tensor;
    int64_t begin, end;  // rows, or elements where nothing has a norm; a matrix of unit columns is one task
};

constexpr int64_t BLOCK = 1 << 16;  // elements of a task, about: 64 KiB of each of the four arrays

// torch's lerp: for a weight of at least one half it starts from the other end
template <bool SMALL>
inline void step(const Tensor& t, const Constants& c, int64_t i) {
    const float g = t.g[i];
    const float m = SMALL ? std::fma(c.one_minus_beta1, g - t.m[i], t.m[i])
                          : std::fma(c.one_minus_beta1 - 1.0f, g - t.m[i], g);
    const float v = std::fma(c.one_minus_beta2 * g, g, t.v[i] * c.beta2);
    const float denominator = std::sqrt(v) / t.bias_correction2_sqrt + c.eps;
    t.m[i] = m;
    t.v[i] = v;
    t.w[i] = t.w[i] * c.decay + -t.step_size * m / denominator;
}

// a zero vector has no direction and stays zero; products instead of quotients, as division bounds the step's speed
inline float inverse_norm(float square) { return square > 0.0f ? 1.0f / std::sqrt(square) : 1.0f; }

template <bool SMALL>
void flat(const Task& task, const Constants& c) {
    const Tensor t = *task.tensor;
#pragma omp simd
    for (int64_t i = task.begin; i < task.end; ++i) step<SMALL>(t, c, i);
}

template <bool SMALL>
void rows(const Task& task, const Constants& c) {
    const Tensor t = *task.tensor;
    for (int64_t row = task.begin; row < task.end; ++row) {
        const int64_t begin = row * t.cols, end = begin + t.cols;
        float square = 0.0f;
#pragma omp simd reduction(+ : square)
        for (int64_t i = begin; i < end; ++i) {
            step<SMALL>(t, c, i);
            square += t.w[i] * t.w[i];
        }
        const float inverse = inverse_norm(square);
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) t.w[i] *= inverse;
    }
}

// Row by row, as memory has it: in tiles of some columns the step would take a third longer (docs/performance.md).
template <bool SMALL>
void columns(const Task& task, const Constants& c) {
    const Tensor t = *task.tensor;
    std::vector<float> factor(t.cols, 0.0f);
    float* __restrict f = factor.data();
    for (int64_t row = 0; row < t.rows; ++row) {
        const int64_t begin = row * t.cols;
#pragma omp simd
        for (int64_t j = 0; j < t.cols; ++j) {
            step<SMALL>(t, c, begin + j);
            f[j] += t.w[begin + j] * t.w[begin + j];
        }
    }
    for (int64_t j = 0; j < t.cols; ++j) f[j] = inverse_norm(f[j]);
    for (int64_t row = 0; row < t.rows; ++row) {
        float* w = t.w + row * t.cols;
#pragma omp simd
        for (int64_t j = 0; j < t.cols; ++j) w[j] *= f[j];
    }
}

template <bool SMALL>
void run(const std::vector<Task>& tasks, const Constants& c, int num_threads) {
    const int64_t n = static_cast<int64_t>(tasks.size());
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (n > 1)
    for (int64_t i = 0; i < n; ++i) {
        const int64_t dim = tasks[i].tensor->dim;
        if (dim == 1) rows<SMALL>(tasks[i], c);
        else if (dim == 0) columns<SMALL>(tasks[i], c);
        else flat<SMALL>(tasks[i], c);
    }
}

}  // namespace

extern "C" void sphere_adamw(const Tensor* tensors, int64_t num_tensors, double lr, double beta1, double beta2,
                             double eps, double weight_decay, int num_threads) {
    const Constants c = {static_cast<float>(1 - lr * weight_decay), static_cast<float>(1 - beta1),
                         static_cast<float>(beta2), static_cast<float>(1 - beta2), static_cast<float>(eps)};
    std::vector<Task> tasks;
    for (const Tensor* t = tensors; t != tensors + num_tensors; ++t)
        if (t->dim == 0) tasks.push_back({t, 0, t->rows});  // the largest tasks first
    for (const Tensor* t = tensors; t != tensors + num_tensors; ++t) {
        if (t->dim == 0 || t->rows * t->cols == 0) continue;
        const int64_t length = t->dim == 1 ? t->rows : t->rows * t->cols;
        const int64_t block = t->dim == 1 ? (t->cols < BLOCK ? BLOCK / t->cols : 1) : BLOCK;
        for (int64_t begin = 0; begin < length; begin += block)
            tasks.push_back({t, begin, begin + block < length ? begin + block : length});
    }
    if (c.one_minus_beta1 < 0.5f) run<true>(tasks, c, num_threads);
    else run<false>(tasks, c, num_threads);
}
