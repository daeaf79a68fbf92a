/* The server's steps in one pass over memory: read the gradient and the state, write the state and the new parameters.
 *
 * Every element goes through the very roundings of the torch operations in steps.py (torch adds with a scale by one fused
 * multiply-add), so it does not matter which of the two runs, nor how a vector is divided among threads. The file must be
 * compiled with -ffp-contract=off: the only fused operations are those written as FMA here.
 *
 * The parameters are not updated in place: `w` is only read and `out` is written. So `w` can go on being the snapshot that
 * others read, and `out` becomes the next one; a copy of the parameters is never made. A gradient of 16 bits is widened as it
 * is read, which is exact. Where `out_16bit` is not NULL, the new parameters are written there as well, rounded to bf16.
 *
 * A large `out` is written past the caches where it is aligned to a vector, which saves reading what is about to be
 * overwritten; a smaller one is still in them when the next step, or a worker, reads it. Each function returns when its stores
 * can be seen by other threads.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* ------------------------------------------------------------------------------------------------------------ 16-bit numbers */

static inline float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float of_bf16(uint16_t half) { return of_bits((uint32_t)half << 16); }

static inline float of_fp16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = (uint32_t)(half & 0x7fffu) << 13;
    if (magnitude >= 0x0f800000u) return of_bits(sign | 0x7f800000u | (magnitude & 0x007fffffu)); /* infinity and NaN */
    float value = of_bits(magnitude) * 0x1p112f; /* the difference of the exponents; exact, subnormal numbers included */
    return sign ? -value : value;
}

/* To nearest, ties to even. */
static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* ------------------------------------------------------------------------------------------------------------------- vectors */

#if defined(__AVX512F__)
#include <immintrin.h>
#define VECTOR(OP) _mm512_##OP
typedef __m512 vector_f32;
typedef __m512d vector_f64;

static inline vector_f32 widened_bf16(const uint16_t *half) {
    __m256i bits = _mm256_loadu_si256((const __m256i *)half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline vector_f32 widened_fp16(const uint16_t *half) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)half));
}
static inline void store_bf16(uint16_t *to, vector_f32 value, int past_caches) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
    if (past_caches)
        _mm256_stream_si256((__m256i *)to, half);
    else
        _mm256_storeu_si256((__m256i *)to, half);
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define VECTOR(OP) _mm256_##OP
typedef __m256 vector_f32;
typedef __m256d vector_f64;

static inline vector_f32 widened_bf16(const uint16_t *half) {
    __m128i bits = _mm_loadu_si128((const __m128i *)half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static inline vector_f32 widened_fp16(const uint16_t *half) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)half));
}
static inline void store_bf16(uint16_t *to, vector_f32 value, int past_caches) {
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i none = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    bits = _mm256_srli_epi32(_mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000), none), 16);
    __m128i half = _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0xd8));
    if (past_caches)
        _mm_stream_si128((__m128i *)to, half);
    else
        _mm_storeu_si128((__m128i *)to, half);
}
#endif

#if defined(VECTOR)
#define FENCE() _mm_sfence()
#define LANES(T) ((int64_t)(sizeof(vector_f32) / sizeof(T)))
#define LARGE (3 << 20) /* bytes; measured, see benchmarks/README.md */
#define PAST_CACHES(T)                                                                                           \
    ((uintptr_t)out % sizeof(vector_f32) == 0 && (uintptr_t)out_16bit % (sizeof(vector_f32) / 2) == 0 &&               \
     n * (int64_t)sizeof(T) >= LARGE)
#else
#define FENCE() ((void)0)
#endif

/* ------------------------------------------------------------------------- how numbers of each type are read, and how rounded */

#define LOAD_f32(P) VECTOR(loadu_ps)(P)
#define LOAD_f64(P) VECTOR(loadu_pd)(P)
#define LOAD_bf16(P) widened_bf16(P)
#define LOAD_fp16(P) widened_fp16(P)
#define VALUE_f32(X) (X)
#define VALUE_f64(X) (X)
#define VALUE_bf16(X) of_bf16(X)
#define VALUE_fp16(X) of_fp16(X)
#define ROUND_f32(PAST) if (out_16bit != NULL) store_bf16(out_16bit + i, y, PAST);
#define ROUND_f64(PAST) /* double to bf16 is up to the caller */
#define ROUND_ONE_f32 if (out_16bit != NULL) out_16bit[i] = to_bf16(out[i]);
#define ROUND_ONE_f64

/* Run the statements for every index from `i` on, as the rest of a vector, or as all of it where there are no vectors. */
#define SCALARS(S, ...) \
    for (; i < n; i++) { __VA_ARGS__ ROUND_ONE_##S }

/* Run the statements, which leave the new parameters in y, for whole vectors, and store y. */
#if defined(VECTOR)
#define VECTORS(T, S, P, ...)                                                   \
    if (PAST_CACHES(T))                                                         \
        for (; i + LANES(T) <= n; i += LANES(T)) {                              \
            __VA_ARGS__ VECTOR(stream_##P)(out + i, y);                         \
            ROUND_##S(1)                                                        \
        }                                                                       \
    else                                                                        \
        for (; i + LANES(T) <= n; i += LANES(T)) {                              \
            __VA_ARGS__ VECTOR(storeu_##P)(out + i, y);                         \
            ROUND_##S(0)                                                        \
        }
#else
#define VECTORS(T, S, P, ...)
#endif

/* The steps for parameters of type T (named S, in intrinsics P, multiplied and added by FMA) and gradients of type G (GS). */
#define STEPS(T, S, P, FMA, G, GS)                                                                              \
    /* out <- w - b g */                                                                                        \
    void sgdstep_##S##_##GS(int64_t n, const G *g, T *u, const T *w, T *out, uint16_t *out_16bit, T b) {                \
        int64_t i = 0;                                                                                          \
        (void)u, (void)out_16bit;                                                                                     \
        VECTORS(T, S, P, vector_##S y = VECTOR(fmadd_##P)(LOAD_##GS(g + i), VECTOR(set1_##P)(-b),               \
                                                          VECTOR(loadu_##P)(w + i));)                           \
        SCALARS(S, out[i] = FMA(VALUE_##GS(g[i]), -b, w[i]);)                                                   \
        FENCE();                                                                                                \
    }                                                                                                           \
    /* u <- beta u + a g;  out <- w - u */                                                                      \
    void heavyballstep_##S##_##GS(int64_t n, const G *g, T *u, const T *w, T *out, uint16_t *out_16bit, T beta, T a) {        \
        int64_t i = 0;                                                                                          \
        (void)out_16bit;                                                                                              \
        VECTORS(T, S, P,                                                                                        \
            vector_##S v = VECTOR(mul_##P)(VECTOR(loadu_##P)(u + i), VECTOR(set1_##P)(beta));                   \
            v = VECTOR(fmadd_##P)(LOAD_##GS(g + i), VECTOR(set1_##P)(a), v);                                    \
            VECTOR(storeu_##P)(u + i, v);                                                                       \
            vector_##S y = VECTOR(sub_##P)(VECTOR(loadu_##P)(w + i), v);)                                       \
        SCALARS(S, T v = FMA(VALUE_##GS(g[i]), a, u[i] * beta); u[i] = v; out[i] = w[i] - v;)                   \
        FENCE();                                                                                                \
    }                                                                                                           \
    /* u <- scale u;  `shifts` times: w <- w - beta u, u <- beta u;  then u <- u + a g, out <- w - b g */       \
    void ormostep_##S##_##GS(int64_t n, const G *g, T *u, const T *w, T *out, uint16_t *out_16bit, T scale,            \
                            int64_t shifts, T beta, T a, T b) {                                                 \
        int64_t i = 0;                                                                                          \
        (void)out_16bit;                                                                                              \
        VECTORS(T, S, P,                                                                                        \
            vector_##S x = LOAD_##GS(g + i), y = VECTOR(loadu_##P)(w + i);                                      \
            vector_##S v = VECTOR(mul_##P)(VECTOR(loadu_##P)(u + i), VECTOR(set1_##P)(scale));                  \
            for (int64_t s = 0; s < shifts; s++) {                                                              \
                y = VECTOR(fmadd_##P)(v, VECTOR(set1_##P)(-beta), y);                                           \
                v = VECTOR(mul_##P)(v, VECTOR(set1_##P)(beta));                                                 \
            }                                                                                                   \
            VECTOR(storeu_##P)(u + i, VECTOR(fmadd_##P)(x, VECTOR(set1_##P)(a), v));                            \
            y = VECTOR(fmadd_##P)(x, VECTOR(set1_##P)(-b), y);)                                                 \
        SCALARS(S,                                                                                              \
            T x = VALUE_##GS(g[i]), y = w[i], v = u[i] * scale;                                                 \
            for (int64_t s = 0; s < shifts; s++) {                                                              \
                y = FMA(v, -beta, y);                                                                           \
                v *= beta;                                                                                      \
            }                                                                                                   \
            u[i] = FMA(x, a, v);                                                                                \
            out[i] = FMA(x, -b, y);)                                                                            \
        FENCE();                                                                                                \
    }

STEPS(float, f32, ps, __builtin_fmaf, float, f32)
STEPS(float, f32, ps, __builtin_fmaf, uint16_t, bf16)
STEPS(float, f32, ps, __builtin_fmaf, uint16_t, fp16)
STEPS(double, f64, pd, __builtin_fma, double, f64)
