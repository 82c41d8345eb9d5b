/* The tile kernels for one instruction set. Included once per set by tile.c with
 *   NAME(x)   the name of a function for this set
 *   TARGET    the function attribute that turns the set on
 *   LANES     floats in one vector
 *   LANE_BITS(mask)   one bit for each lane of a comparison, NARROW(codes) 32-bit codes as 16-bit ones
 *   FINISH(w, sum, bound, norm, half, changed)   what an exact block does to one row, where the set has a better way than the one below
 *   HALF_UP / HALF_DOWN   fp16 conversion by instruction; when absent by integer arithmetic
 *
 *   FMA / FMAD   a * b + c of float and double vectors, fused where the set has it
 *
 * Sums run over CHUNK ranks at a time and the partial sums are added up: their error grows with CHUNK + R / CHUNK instead of R.
 * Vectors are GCC/Clang vector extensions: the compiler maps them to the set that TARGET names.
 *
 * A block is ROWS rows by 2 * LANES columns. `down` comes packed in panels of 2 * LANES columns, so that the R values a block needs
 * lie together and never fight for the same cache sets.
 */

#define WIDE (2 * LANES)

typedef float NAME(vf) __attribute__((vector_size(LANES * 4)));
typedef uint32_t NAME(vu) __attribute__((vector_size(LANES * 4)));
typedef int32_t NAME(vi) __attribute__((vector_size(LANES * 4)));
typedef uint16_t NAME(vh) __attribute__((vector_size(LANES * 2)));
typedef double NAME(vd) __attribute__((vector_size(LANES * 4)));
typedef uint64_t NAME(vul) __attribute__((vector_size(LANES * 4)));
typedef int64_t NAME(vil) __attribute__((vector_size(LANES * 4)));
typedef float NAME(vfs) __attribute__((vector_size(LANES * 2)));
typedef uint32_t NAME(vus) __attribute__((vector_size(LANES * 2)));

#define VF NAME(vf)
#define VU NAME(vu)
#define VI NAME(vi)
#define VH NAME(vh)
#define VD NAME(vd)
#define VUL NAME(vul)
#define VIL NAME(vil)
#define VFS NAME(vfs)
#define VUS NAME(vus)

#ifndef LANE_BITS
#define LANE_BITS(mask) NAME(lane_bits)(mask)
#define NARROW(codes) __builtin_convertvector(codes, VH)
TARGET static inline uint32_t NAME(lane_bits)(VU mask)
{
    uint32_t lanes[LANES], bits = 0;
    memcpy(lanes, &mask, sizeof mask);
    for (int lane = 0; lane < LANES; lane++)
        bits |= (lanes[lane] & 1u) << lane;
    return bits;
}
#endif

/* Codes of fp16 values of magnitude a (sign removed), rounded to nearest even. Normal results by rounding the mantissa in place,
 * subnormal ones by adding 0.5, whose unit in the last place is the spacing of fp16 subnormals. */
TARGET static inline VU NAME(half_code)(VF a)
{
#ifdef HALF_DOWN
    return HALF_DOWN(a);
#else
    VU bits = (VU)a;
    VU normal = (bits + 0xFFFu + ((bits >> 13) & 1u) - (112u << 23)) >> 13;
    VF shifted = a + 0.5f;
    VU small = (VU)shifted - 0x3F000000u;
    VU is_small = (VU)(a < 6.103515625e-05f);
    return (normal & ~is_small) | (small & is_small);
#endif
}

TARGET static inline VF NAME(half_value)(VU code)
{
#ifdef HALF_UP
    return HALF_UP(code);
#else
    VU magnitude = (code & 0x7FFFu) << 13;
    VF value = (VF)magnitude * 5.192296858534828e+33f; /* 2^112: moves the exponent, subnormals included */
    return (VF)((VU)value | ((code & 0x8000u) << 16));
#endif
}

/* One block of 16-bit weights: w = round(w + up . panel) where that is certain. Doubtful elements keep their old code and are marked. */
TARGET static inline __attribute__((always_inline)) int NAME(block16)(
    uint16_t *const *w, const float *const *up, const float *panel, long rank, const float *row_bound, const float *column_norm,
    int half, int exact, long *changed, uint32_t *marks)
{
    VF sum[ROWS][2], part[ROWS][2];
    for (int i = 0; i < ROWS; i++)
        sum[i][0] = sum[i][1] = (VF){0};
    for (long from = 0; from < rank; from += CHUNK) {
        long to = from + CHUNK < rank ? from + CHUNK : rank;
        for (int i = 0; i < ROWS; i++)
            part[i][0] = part[i][1] = (VF){0};
        for (long k = from; k < to; k++) {
            VF d0, d1;
            memcpy(&d0, panel + k * WIDE, sizeof d0);
            memcpy(&d1, panel + k * WIDE + LANES, sizeof d1);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) {
                VF u = up[i][k] - (VF){0};
                part[i][0] = FMA(u, d0, part[i][0]);
                part[i][1] = FMA(u, d1, part[i][1]);
            }
        }
        for (int i = 0; i < ROWS; i++) {
            sum[i][0] += part[i][0];
            sum[i][1] += part[i][1];
        }
    }
    uint32_t any = 0;
#ifdef FINISH
    if (exact) {
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
            any |= marks[i] = FINISH(w[i], sum[i], row_bound[i], column_norm, half, changed);
        return any != 0;
    }
#endif
    const float limit = half ? 65472.0f : 3.36e38f;
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        uint32_t mark = 0;
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            VH stored;
            memcpy(&stored, w[i] + j * LANES, sizeof stored);
            VU old = __builtin_convertvector(stored, VU);
            VF value = half ? NAME(half_value)(old) : (VF)(old << 16);
            value += sum[i][j];
            VU bits = (VU)value;
            VU sign = bits & 0x80000000u;
            VF a = (VF)(bits ^ sign);
            VU code;
            VU doubt = (VU)(a <= limit) ^ 0xFFFFFFFFu; /* also true for NaN */
            if (exact) {
                /* The true value lies within `reach` of a: the bound of the sum, 2e-37 for what underflows (and so that the sign of a
                 * zero is always settled), and the roundings of value, low and high, together below 2^-24 + 2^-23 of a. The element is
                 * certain where both ends round alike; an end beyond zero carries a sign bit and never does. */
                VF norm;
                memcpy(&norm, column_norm + j * LANES, sizeof norm);
                VF bound = row_bound[i] - (VF){0}, tiny = 2e-37f - (VF){0}, part_of_a = 1.8e-07f - (VF){0};
                VF reach = FMA(a, part_of_a, FMA(norm, bound, tiny));
                VU low = (VU)(a - reach), high = (VU)(a + reach);
                if (half) {
                    code = NAME(half_code)((VF)high);
                    doubt |= (VU)(NAME(half_code)((VF)low) != code) | (VU)((VI)low < 0);
                } else { /* ties lie strictly between the ends, so rounding them upward is as good as to even */
                    high += 0x8000u;
                    low += 0x8000u;
                    code = high >> 16;
                    doubt |= (VU)((low ^ high) > 0xFFFFu);
                }
            } else if (half)
                code = NAME(half_code)(a);
            else
                code = (((VU)a) + 0x7FFFu + (((VU)a >> 16) & 1u)) >> 16;
            code |= sign >> 16;
#ifndef HALF_UP
            if (half) /* Inf and NaN came out of half_value as large numbers */
                doubt |= (VU)((old & 0x7C00u) == 0x7C00u);
#endif
            code = (code & ~doubt) | (old & doubt);
            *changed += __builtin_popcount(LANE_BITS((VU)(code != old)));
            mark |= (uint32_t)LANE_BITS(doubt) << (j * LANES);
            VH out = NARROW(code);
            memcpy(w[i] + j * LANES, &out, sizeof out);
        }
        marks[i] = mark;
        any |= mark;
    }
    return any != 0;
}

/* The same for float32 weights with sums in float64. */
TARGET static inline __attribute__((always_inline)) int NAME(block32)(
    float *const *w, const double *const *up, const double *panel, long rank, const float *row_bound, const float *column_norm,
    int half, int exact, long *changed, uint32_t *marks)
{
    (void)half;
    VD sum[ROWS][2], part[ROWS][2];
    for (int i = 0; i < ROWS; i++)
        sum[i][0] = sum[i][1] = (VD){0};
    for (long from = 0; from < rank; from += CHUNK) {
        long to = from + CHUNK < rank ? from + CHUNK : rank;
        for (int i = 0; i < ROWS; i++)
            part[i][0] = part[i][1] = (VD){0};
        for (long k = from; k < to; k++) {
            VD d0, d1;
            memcpy(&d0, panel + k * LANES, sizeof d0);
            memcpy(&d1, panel + k * LANES + LANES / 2, sizeof d1);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) {
                VD u = up[i][k] - (VD){0};
                part[i][0] = FMAD(u, d0, part[i][0]);
                part[i][1] = FMAD(u, d1, part[i][1]);
            }
        }
        for (int i = 0; i < ROWS; i++) {
            sum[i][0] += part[i][0];
            sum[i][1] += part[i][1];
        }
    }
    uint32_t any = 0;
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        uint32_t mark = 0;
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            VFS stored, norm;
            memcpy(&stored, w[i] + j * (LANES / 2), sizeof stored);
            VUS old = (VUS)stored;
            VD value = __builtin_convertvector(stored, VD) + sum[i][j];
            VUL bits = (VUL)value & 0x7FFFFFFFFFFFFFFFu;
            VD a = (VD)bits;
            VFS rounded = __builtin_convertvector(value, VFS);
            VUL unsure = (VUL)((a <= 3.4028e38) & (a >= 1.1754943508222875e-38)) ^ 0xFFFFFFFFFFFFFFFFu;
            if (exact) {
                memcpy(&norm, column_norm + j * (LANES / 2), sizeof norm);
                VD mid = (VD)((bits & ~0x1FFFFFFFull) | 0x10000000ull);
                VD bound = __builtin_convertvector(norm, VD) * (row_bound[i] * 3.725290298461914e-09) + a * 4.44e-16;
                VD off = (VD)((VUL)(a - mid) & 0x7FFFFFFFFFFFFFFFu);
                unsure |= (VUL)(off <= bound) | (VUL)(bound >= a * 1.4901161193847656e-08); /* 2^-26: a quarter of the spacing */
            }
            VUS doubt = __builtin_convertvector(unsure, VUS);
            VUS code = ((VUS)rounded & ~doubt) | (old & doubt);
            uint32_t lanes[LANES / 2], doubts[LANES / 2];
            VUS differs = (VUS)(code != old);
            memcpy(lanes, &differs, sizeof differs);
            memcpy(doubts, &doubt, sizeof doubt);
            for (int lane = 0; lane < LANES / 2; lane++) {
                *changed += lanes[lane] & 1u;
                mark |= (doubts[lane] & 1u) << (j * (LANES / 2) + lane);
            }
            memcpy(w[i] + j * (LANES / 2), &code, sizeof code);
        }
        marks[i] = mark;
        any |= mark;
    }
    return any != 0;
}

/* Panels are taken in groups that fit the first-level cache beside what they change, so that a row's bytes are met in runs of several
 * cache lines: at a stride of 4 KiB single lines would all fight for one cache set. */
#define TILE(function, block, element, factor, width)                                                                                   \
    TARGET static long NAME(function)(                                                                                                  \
        element *stored, long rows, long columns, const factor *up, const factor *panels, long rank, const float *row_bound,            \
        const float *column_norm, int half, int exact, uint32_t *doubtful, long *changed_out)                                           \
    {                                                                                                                                   \
        long found = 0, changed = 0, group = GROUP_BYTES / (width * (long)sizeof(factor) * (rank ? rank : 1));                          \
        group = (group < 1 ? 1 : group) * width;                                                                                        \
        uint32_t marks[ROWS];                                                                                                           \
        element edge[ROWS][width];                                                                                                      \
        element *w[ROWS];                                                                                                               \
        const factor *u[ROWS];                                                                                                          \
        float bound[ROWS];                                                                                                              \
        for (long first = 0; first < columns; first += group) {                                                                         \
            long last = columns - first < group ? columns : first + group;                                                              \
            for (long i = 0; i < rows; i += ROWS) {                                                                                     \
                long high = rows - i < ROWS ? rows - i : ROWS;                                                                          \
                for (long r = 0; r < ROWS; r++) {                                                                                       \
                    long row = i + (r < high ? r : 0);                                                                                  \
                    u[r] = up + row * rank;                                                                                             \
                    bound[r] = row_bound[row];                                                                                          \
                }                                                                                                                       \
                for (long j = first; j < last; j += width) {                                                                            \
                    const factor *panel = panels + j * rank;                                                                            \
                    long wide = columns - j < width ? columns - j : width;                                                              \
                    int whole = high == ROWS && wide == width;                                                                          \
                    if (!whole)                                                                                                         \
                        memset(edge, 0, sizeof edge);                                                                                   \
                    for (long r = 0; r < ROWS; r++) {                                                                                   \
                        w[r] = whole ? stored + (i + r) * columns + j : edge[r];                                                        \
                        if (!whole && r < high)                                                                                         \
                            memcpy(edge[r], stored + (i + r) * columns + j, (size_t)wide * sizeof(element));                            \
                    }                                                                                                                   \
                    long before = changed;                                                                                              \
                    int some = half   ? exact ? NAME(block)(w, u, panel, rank, bound, column_norm + j, 1, 1, &changed, marks)           \
                                              : NAME(block)(w, u, panel, rank, bound, column_norm + j, 1, 0, &changed, marks)           \
                               : exact ? NAME(block)(w, u, panel, rank, bound, column_norm + j, 0, 1, &changed, marks)                  \
                                       : NAME(block)(w, u, panel, rank, bound, column_norm + j, 0, 0, &changed, marks);                 \
                    if (!whole) {                                                                                                       \
                        changed = before; /* padding must not count */                                                                  \
                        for (long r = 0; r < high; r++)                                                                                 \
                            for (long c = 0; c < wide; c++) {                                                                           \
                                element *place = stored + (i + r) * columns + j + c;                                                    \
                                changed += memcmp(place, &edge[r][c], sizeof(element)) != 0;                                            \
                                *place = edge[r][c];                                                                                    \
                            }                                                                                                           \
                    }                                                                                                                   \
                    if (some)                                                                                                           \
                        for (long r = 0; r < high; r++)                                                                                 \
                            for (uint32_t mark = marks[r]; mark; mark &= mark - 1) {                                                    \
                                long c = __builtin_ctz(mark);                                                                           \
                                if (c < wide)                                                                                           \
                                    doubtful[found++] = (uint32_t)((i + r) * columns + j + c);                                          \
                            }                                                                                                           \
                }                                                                                                                       \
            }                                                                                                                           \
        }                                                                                                                               \
        *changed_out = changed;                                                                                                         \
        return found;                                                                                                                   \
    }

TILE(tile16, block16, uint16_t, float, WIDE)
TILE(tile32, block32, float, double, LANES)

#undef TILE
#undef WIDE
#undef VF
#undef VU
#undef VI
#undef VH
#undef VD
#undef VUL
#undef VIL
#undef VFS
#undef VUS
