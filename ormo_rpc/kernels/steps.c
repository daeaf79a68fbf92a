/* The server's steps in one pass over memory: read the gradient and the state, write the state and the new parameters.
 *
 * Every element goes through the very roundings of the torch operations in steps.py (torch adds with a scale by one fused
 * multiply-add), so it does not matter which of the two runs, nor how a vector is divided among threads. The file must be
 * compiled with -ffp-contract=off: the only fused operations are those written as FMA here.
 *
 * The parameters are not updated in place: `w` is only read and `out` is written. So `w` can go on being the snapshot that
 * others read, and `out` becomes the next one; a copy of the parameters is never made. `u_out` may be `u`.
 *
 * A large `out` is written past the caches where it is aligned to a vector, which saves reading what is about to be
 * overwritten; a smaller one is still in them when the next step, or a worker, reads it. Each function returns when its stores
 * can be seen by other threads.
 */
#include <stdint.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define VECTOR(OP) _mm512_##OP
typedef __m512 vector_f32;
typedef __m512d vector_f64;
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define VECTOR(OP) _mm256_##OP
typedef __m256 vector_f32;
typedef __m256d vector_f64;
#endif

#if defined(VECTOR)
#define FENCE() _mm_sfence()
#define LANES(T) ((int64_t)(sizeof(vector_f32) / sizeof(T)))
#define LARGE (3 << 20) /* bytes; measured, see benchmarks/README.md */
#define PAST_CACHES(P, T) ((uintptr_t)(P) % sizeof(vector_f32) == 0 && n * (int64_t)sizeof(T) >= LARGE)
#else
#define FENCE() ((void)0)
#endif

/* Run the statements for every index from `i` on, as the rest of a vector, or as all of it where there are no vectors. */
#define SCALARS(...) \
    for (; i < n; i++) { __VA_ARGS__ }

/* Run the statements, which leave the new parameters in y, for whole vectors, and store y. */
#if defined(VECTOR)
#define VECTORS(T, P, ...)                                         \
    if (PAST_CACHES(out, T))                                                           \
        for (; i + LANES(T) <= n; i += LANES(T)) {                              \
            __VA_ARGS__ VECTOR(stream_##P)(out + i, y);                    \
        }                                                                       \
    else                                                                        \
        for (; i + LANES(T) <= n; i += LANES(T)) {                              \
            __VA_ARGS__ VECTOR(storeu_##P)(out + i, y);                    \
        }
#else
#define VECTORS(T, P, ...)
#endif

#define STEPS(T, S, P, FMA)                                                                                     \
    /* out <- w - b g */                                                                                        \
    void plain_##S(int64_t n, const T *g, const T *w, T *out, T b) {                                            \
        int64_t i = 0;                                                                                          \
        VECTORS(T, P, vector_##S y = VECTOR(fmadd_##P)(VECTOR(loadu_##P)(g + i), VECTOR(set1_##P)(-b),          \
                                                       VECTOR(loadu_##P)(w + i));)                              \
        SCALARS(out[i] = FMA(g[i], -b, w[i]);)                                                                  \
        FENCE();                                                                                                \
    }                                                                                                           \
    /* u <- beta u + a g;  out <- w - u */                                                                      \
    void heavy_##S(int64_t n, const T *g, const T *u, T *u_out, const T *w, T *out, T beta, T a) {              \
        int64_t i = 0;                                                                                          \
        VECTORS(T, P,                                                                                           \
            vector_##S v = VECTOR(mul_##P)(VECTOR(loadu_##P)(u + i), VECTOR(set1_##P)(beta));                   \
            v = VECTOR(fmadd_##P)(VECTOR(loadu_##P)(g + i), VECTOR(set1_##P)(a), v);                            \
            VECTOR(storeu_##P)(u_out + i, v);                                                                   \
            vector_##S y = VECTOR(sub_##P)(VECTOR(loadu_##P)(w + i), v);)                                       \
        SCALARS(T v = FMA(g[i], a, u[i] * beta); u_out[i] = v; out[i] = w[i] - v;)                              \
        FENCE();                                                                                                \
    }                                                                                                           \
    /* u <- scale u;  `shifts` times: w <- w - beta u, u <- beta u;  then u <- u + a g, out <- w - b g */       \
    void ordered_##S(int64_t n, const T *g, const T *u, T *u_out, const T *w, T *out, T scale, int64_t shifts,  \
                     T beta, T a, T b) {                                                                        \
        int64_t i = 0;                                                                                          \
        VECTORS(T, P,                                                                                           \
            vector_##S x = VECTOR(loadu_##P)(g + i), y = VECTOR(loadu_##P)(w + i);                              \
            vector_##S v = VECTOR(mul_##P)(VECTOR(loadu_##P)(u + i), VECTOR(set1_##P)(scale));                  \
            for (int64_t s = 0; s < shifts; s++) {                                                              \
                y = VECTOR(fmadd_##P)(v, VECTOR(set1_##P)(-beta), y);                                           \
                v = VECTOR(mul_##P)(v, VECTOR(set1_##P)(beta));                                                 \
            }                                                                                                   \
            VECTOR(storeu_##P)(u_out + i, VECTOR(fmadd_##P)(x, VECTOR(set1_##P)(a), v));                        \
            y = VECTOR(fmadd_##P)(x, VECTOR(set1_##P)(-b), y);)                                                 \
        SCALARS(                                                                                                \
            T y = w[i], v = u[i] * scale;                                                                       \
            for (int64_t s = 0; s < shifts; s++) {                                                              \
                y = FMA(v, -beta, y);                                                                           \
                v *= beta;                                                                                      \
            }                                                                                                   \
            u_out[i] = FMA(g[i], a, v);                                                                         \
            out[i] = FMA(g[i], -b, y);)                                                                         \
        FENCE();                                                                                                \
    }

STEPS(float, f32, ps, __builtin_fmaf)
STEPS(double, f64, pd, __builtin_fma)
