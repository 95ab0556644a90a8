/* Selection, layouts, dots and errors of a batch, for processors: what `sparse_encode.py`, `sparse_ops.py`, `losses.py` compute.

   `sparse_c.py` compiles and calls it. Every function has a twin there in torch and numpy, which says the same; order of sums
   and ties depend on the data alone. Rows of a matrix may lie apart (`*_stride`, in floats), a row itself lies together.
   An entry (t, j) of a batch is a token and a latent, its flat position t · d_dict + j. Bounds are bf16 where `low`, else float32.
*/

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16  /* floats that are computed together */
#define GROUP 16  /* latents of a group whose largest bound is compared with that of others */
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half_lanes __attribute__((vector_size(2 * LANES)));

INLINE lanes load(const float *a)
{
    return *(const lanes *)a;
}

INLINE float total(lanes v)
{
    half_lanes sum = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
    sum += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

INLINE float dot(const float *a, const float *b, int64_t d)
{
    lanes sums[4] = {{0}, {0}, {0}, {0}};  /* four, since an addition takes four cycles */
    int64_t i = 0;
    for (; i + 4 * LANES <= d; i += 4 * LANES)
        for (int c = 0; c < 4; c++)
            sums[c] += load(a + i + c * LANES) * load(b + i + c * LANES);
    for (; i + LANES <= d; i += LANES)
        sums[0] += load(a + i) * load(b + i);
    float sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < d; i++)
        sum += a[i] * b[i];
    return sum;
}

INLINE float bound_at(const void *bounds, int low, int64_t i)
{
    if (!low)
        return ((const float *)bounds)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)bounds)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* ------------------------------------------------------------------------------------------------------------ rounding */

/* low[i] = x[i] in bf16, to nearest and even; norm[i] = |x[i]|, rest[i] = |x[i] - low[i]|. NaN and inf show in the norm. */
void round_rows(const float *x, int64_t x_stride, int64_t n, int64_t d, uint16_t *low, int64_t low_stride, float *norm,
                float *rest)
{
    for (int64_t t = 0; t < n; t++) {
        const float *row = x + t * x_stride;
        uint16_t *restrict out = low + t * low_stride;
        float square = 0, lost = 0;
        for (int64_t i = 0; i < d; i++) {
            uint32_t bits, rounded;
            float value;
            memcpy(&bits, &row[i], sizeof bits);
            rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
            memcpy(&value, &rounded, sizeof value);
            out[i] = (uint16_t)(rounded >> 16);
            square += row[i] * row[i];
            lost += (row[i] - value) * (row[i] - value);
        }
        norm[t] = sqrtf(square);
        rest[t] = sqrtf(lost);
    }
}

/* ----------------------------------------------------------------------------------------------------------- selection */

/* Where the bounds of a row reach a floor, ascending, in `at`, which has room for LANES more; returns how many do. */
INLINE int64_t scan_row(const void *bounds, int low, int64_t begin, int64_t n, float floor, int32_t *at)
{
    int64_t found = 0, j = 0;
#ifdef __AVX512F__
    __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; j + LANES <= n; j += LANES, place = _mm512_add_epi32(place, _mm512_set1_epi32(LANES))) {
        __m512 bound;
        if (low) {
            __m256i half = _mm256_loadu_si256((const __m256i *)((const uint16_t *)bounds + begin + j));
            bound = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        } else {
            bound = _mm512_loadu_ps((const float *)bounds + begin + j);
        }
        __mmask16 hit = _mm512_cmp_ps_mask(bound, _mm512_set1_ps(floor), _CMP_GE_OQ);
        _mm512_storeu_si512(at + found, _mm512_maskz_compress_epi32(hit, place));
        found += __builtin_popcount(hit);
    }
#endif
    for (; j < n; j++) {
        at[found] = (int32_t)j;
        found += bound_at(bounds, low, begin + j) >= floor;
    }
    return found;
}

INLINE int64_t scan_rows(const void *bounds, int low, int64_t n, int64_t d_dict, float floor, int64_t first, int64_t room,
                         int64_t *flat, float *upper)
{
    int32_t *at = malloc((d_dict + LANES) * sizeof *at);
    int64_t found = 0;
    for (int64_t t = 0; t < n; t++) {
        int64_t own = scan_row(bounds, low, t * d_dict, d_dict, floor, at);
        if (found + own <= room)
            for (int64_t e = 0; e < own; e++) {
                flat[found + e] = (first + t) * d_dict + at[e];
                upper[found + e] = bound_at(bounds, low, t * d_dict + at[e]);
            }
        found += own;
    }
    free(at);
    return found;
}

/* Flat positions and values of the bounds (n, d_dict) that reach a floor; their first row is token `first`. Returns how many
   do; where they are more than there is room for, what was written is of no use. */
int64_t scan(const void *bounds, int low, int64_t n, int64_t d_dict, float floor, int64_t first, int64_t room, int64_t *flat,
             float *upper)
{
    if (low)  /* each with `low` a constant */
        return scan_rows(bounds, 1, n, d_dict, floor, first, room, flat, upper);
    return scan_rows(bounds, 0, n, d_dict, floor, first, room, flat, upper);
}

/* An integer in the order of floats; both zeros are one, NaN is the largest. */
INLINE int32_t key_of(float value)
{
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = bits == INT32_MIN ? 0 : bits ^ ((bits >> 31) & INT32_MAX);
    return value != value ? INT32_MAX : bits;
}

INLINE float value_of(int32_t key)
{
    key ^= (key >> 31) & INT32_MAX;
    float value;
    memcpy(&value, &key, sizeof value);
    return value;
}

/* The k-th largest of n keys, 1 <= k <= n: by bisection, since counting has no branches. */
static int32_t kth_key(const int32_t *keys, int64_t n, int64_t k)
{
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        least = keys[i] < least ? keys[i] : least;
        most = keys[i] > most ? keys[i] : most;
    }
    while (least < most) {  /* at least k keys reach `least`, fewer exceed `most` */
        int32_t middle = (int32_t)(((int64_t)least + most + 1) >> 1), reach = 0;
        for (int64_t i = 0; i < n; i++)
            reach += keys[i] >= middle;
        if (reach < k) {
            most = middle - 1;
        } else if (reach > k) {
            least = middle;
        } else {
            least = INT32_MAX;
            for (int64_t i = 0; i < n; i++)
                least = keys[i] >= middle && keys[i] < least ? keys[i] : least;
            break;
        }
    }
    return least;
}

/* Ascending positions of the k largest of n values: ties go to the first, NaN counts as infinite. */
void largest(const float *values, int64_t n, int64_t k, int64_t *at)
{
    int32_t *keys = malloc(n * sizeof *keys), infinite = key_of(INFINITY);
    for (int64_t i = 0; i < n; i++) {
        int32_t key = key_of(values[i]);
        keys[i] = key < infinite ? key : infinite;
    }
    int32_t kth = kth_key(keys, n, k);
    int64_t ties = k, found = 0;
    for (int64_t i = 0; i < n; i++)
        ties -= keys[i] > kth;
    for (int64_t i = 0; i < n && found < k; i++) {
        int equal = keys[i] == kth && ties > 0;
        at[found] = i;
        found += keys[i] > kth || equal;
        ties -= equal;
    }
    free(keys);
}

/* out[e] = x[rows[e]] . W[cols[e]], plus b[cols[e]] where there is a b. */
void pair_dots(int64_t n, const int64_t *rows, const int64_t *cols, const float *x, int64_t x_stride, const float *W,
               int64_t W_stride, const float *b, int64_t d, float *out)
{
    for (int64_t e = 0; e < n; e++)
        out[e] = dot(x + rows[e] * x_stride, W + cols[e] * W_stride, d) + (b ? b[cols[e]] : 0);
}

INLINE int64_t select_rows(const void *bounds, int low, int64_t n, int64_t d_dict, int64_t k, float slack,
                                  const float *x, int64_t x_stride, const float *W, int64_t W_stride, const float *b,
                                  int64_t d, int64_t first, int64_t room, int64_t *flat, float *pre)
{
    int64_t groups = d_dict / GROUP, dots = 0;
    int32_t *room_for_all = malloc(4 * (d_dict + LANES) * sizeof *room_for_all);
    int32_t *keys = room_for_all, *at = keys + d_dict + LANES, *wider = at + d_dict + LANES;
    float *value = malloc(2 * (d_dict + LANES) * sizeof *value), *wider_value = value + d_dict + LANES;
    for (int64_t t = 0; t < n && dots >= 0; t++) {
        const float *own = x + t * x_stride;
        int64_t begin = t * d_dict, found, above = 0, ties = 0;
        float start = -INFINITY;
        if (k <= groups) {  /* k groups have a bound that reaches the k-th largest of the groups' largest bounds */
            for (int64_t g = 0; g < groups; g++)
                keys[g] = INT32_MIN;
            for (int member = 0; member < GROUP; member++)
                for (int64_t g = 0; g < groups; g++) {
                    int32_t key = key_of(bound_at(bounds, low, begin + member * groups + g));
                    keys[g] = key > keys[g] ? key : keys[g];
                }
            start = value_of(kth_key(keys, groups, k));
        }
        found = scan_row(bounds, low, begin, d_dict, start, at);
        dots = found < k || dots + found > room ? -1 : dots + found;
        if (dots < 0)
            break;
        for (int64_t e = 0; e < found; e++) {
            value[e] = low ? dot(own, W + at[e] * W_stride, d) + b[at[e]] : bound_at(bounds, low, begin + at[e]);
            keys[e] = key_of(value[e]);
        }
        int32_t kth = kth_key(keys, found, k);
        if (low) {  /* whoever wins has a bound that reaches the smallest of these k */
            float least = value_of(kth);
            int64_t also = scan_row(bounds, low, begin, d_dict, least - fabsf(least) * 2 * slack, wider), known = 0;
            for (int64_t e = 0; e < also; e++) {
                while (known < found && at[known] < wider[e])
                    known++;
                int seen = known < found && at[known] == wider[e];
                wider_value[e] = seen ? value[known] : dot(own, W + wider[e] * W_stride, d) + b[wider[e]];
                keys[e] = key_of(wider_value[e]);
                dots += !seen;
            }
            int32_t *swap = at;
            float *swap_value = value;
            at = wider, wider = swap, value = wider_value, wider_value = swap_value;
            found = also;
            if (dots > room || found < k) {
                dots = -1;
                break;
            }
            kth = kth_key(keys, found, k);
        }
        for (int64_t e = 0; e < found; e++)
            above += keys[e] > kth;
        ties = k - above;
        for (int64_t e = 0, winner = 0; e < found && winner < k; e++) {
            int equal = keys[e] == kth && ties > 0;
            flat[t * k + winner] = (first + t) * d_dict + at[e];
            pre[t * k + winner] = value[e];
            winner += keys[e] > kth || equal;
            ties -= equal;
        }
    }
    free(room_for_all);
    free(value < wider_value ? value : wider_value);
    return dots;
}

/* The k largest pre-activations of each of n tokens, in the order of their latents: ties go to the lowest.

   bounds (n, d_dict): pre <= u + |u| slack, in bf16 where `low`; else the pre-activations themselves, and x, W, b are not read.
   Returns how many pre-activations were looked at, or -1 where they are more than `room`, or where one is NaN. */
int64_t winners_by_token(const void *bounds, int low, int64_t n, int64_t d_dict, int64_t k, float slack, const float *x,
                         int64_t x_stride, const float *W, int64_t W_stride, const float *b, int64_t d, int64_t first,
                         int64_t room, int64_t *flat, float *pre)
{
    if (low)  /* each with `low` a constant */
        return select_rows(bounds, 1, n, d_dict, k, slack, x, x_stride, W, W_stride, b, d, first, room, flat, pre);
    return select_rows(bounds, 0, n, d_dict, k, slack, x, x_stride, W, W_stride, b, d, first, room, flat, pre);
}

/* -------------------------------------------------------------------------------------------------------------- layout */

/* Tokens, latents and each token's first entry (n + 1 of them), of ascending flat positions. */
void locate(const int64_t *flat, int64_t active, int64_t n, int64_t d_dict, int64_t *rows, int64_t *cols, int64_t *starts)
{
    for (int64_t t = 0, e = 0; t < n; t++) {
        starts[t] = e;
        for (; e < active && flat[e] < (t + 1) * d_dict; e++) {
            rows[e] = t;
            cols[e] = flat[e] - t * d_dict;
        }
    }
    starts[n] = active;
}

/* Positions of the entries in the order of their latents, in that of their tokens within; each latent's first (d_dict + 1). */
void order_by_latent(const int64_t *cols, int64_t active, int64_t d_dict, int64_t *order, int64_t *starts)
{
    int64_t *next = calloc(d_dict, sizeof *next), begin = 0;
    for (int64_t e = 0; e < active; e++)
        next[cols[e]]++;
    for (int64_t j = 0; j < d_dict; j++) {
        int64_t own = next[j];
        next[j] = starts[j] = begin;
        begin += own;
    }
    starts[d_dict] = begin;
    for (int64_t e = 0; e < active; e++)
        order[next[cols[e]]++] = e;
    free(next);
}

/* -------------------------------------------------------------------------------------------------------------- errors */

/* error[t] = sum over a row of (e - a e_hat)^2, e = y - y_hat (y where there is no y_hat), a = 1; where there is an `alpha`,
   a = alpha[t], set to what in [0, 1] makes the error least, and to 1 where e_hat is zero. */
void residuals(int64_t n, int64_t d, const float *y, const float *y_hat, const float *e_hat, float *alpha, float *error)
{
    for (int64_t t = 0; t < n; t++, y += d, e_hat += d, y_hat = y_hat ? y_hat + d : NULL) {
        float along = 0, square = 0, sum = 0, a = 1;
        if (alpha) {
            for (int64_t i = 0; i < d; i++) {
                along += (y_hat ? y[i] - y_hat[i] : y[i]) * e_hat[i];
                square += e_hat[i] * e_hat[i];
            }
            a = alpha[t] = along < square ? (along > 0 ? along : 0) / square : 1;
        }
        for (int64_t i = 0; i < d; i++) {
            float left = (y_hat ? y[i] - y_hat[i] : y[i]) - a * e_hat[i];
            sum += left * left;
        }
        error[t] = sum;
    }
}

/* out = grad[t] d error[t] / d e_hat, a constant. */
void residuals_backward(int64_t n, int64_t d, const float *y, const float *y_hat, const float *e_hat, const float *alpha,
                        const float *grad, float *out)
{
    for (int64_t t = 0; t < n; t++, y += d, e_hat += d, out += d, y_hat = y_hat ? y_hat + d : NULL) {
        float a = alpha ? alpha[t] : 1, factor = 2 * a * grad[t];
        for (int64_t i = 0; i < d; i++)
            out[i] = factor * (a * e_hat[i] - (y_hat ? y[i] - y_hat[i] : y[i]));
    }
}
