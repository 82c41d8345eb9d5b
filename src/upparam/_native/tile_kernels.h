/* The tile kernels for one instruction set. Included once per set by tile.c with
 *   NAME(x)   the name of a function for this set
 *   TARGET    the function attribute that turns the set on
 *   LANES     floats in one vector
 *   LANE_BITS(mask)   one bit for each lane of a comparison, NARROW(codes) 32-bit codes as 16-bit ones
 *   COUNT(mask), ANY(mask)   how many 16-bit lanes are set, whether one is
 *   ROW_OF_BFLOAT, ROW_OF_HALF   what a block does to one row, where the set has a better way than the ones below
 *   HALF_UP / HALF_DOWN   fp16 conversion by instruction; when absent by integer arithmetic
 *
 *   FMA / FMAD   a * b + c of float and double vectors, fused where the set has it
 *
 * Sums run over CHUNK ranks at a time and the partial sums are added up: their error grows with CHUNK + R / CHUNK instead of R.
 * Vectors are GCC/Clang vector extensions: the compiler maps them to the set that TARGET names.
 *
 * A block is ROWS rows by 2 * LANES columns. `down` comes packed in panels of 2 * LANES columns, so that the R values a block needs
 * lie together and never fight for the same cache sets; for bfloat16 the even columns of a panel come before the odd ones.
 */

#define WIDE (2 * LANES)

typedef float NAME(vf) __attribute__((vector_size(LANES * 4)));
typedef uint32_t NAME(vu) __attribute__((vector_size(LANES * 4)));
typedef int32_t NAME(vi) __attribute__((vector_size(LANES * 4)));
typedef uint16_t NAME(vh) __attribute__((vector_size(LANES * 2)));
typedef uint16_t NAME(vw) __attribute__((vector_size(LANES * 4)));
typedef double NAME(vd) __attribute__((vector_size(LANES * 4)));
typedef uint64_t NAME(vul) __attribute__((vector_size(LANES * 4)));
typedef int64_t NAME(vil) __attribute__((vector_size(LANES * 4)));
typedef float NAME(vfs) __attribute__((vector_size(LANES * 2)));
typedef uint32_t NAME(vus) __attribute__((vector_size(LANES * 2)));

#define VF NAME(vf)
#define VU NAME(vu)
#define VI NAME(vi)
#define VH NAME(vh)
#define VW NAME(vw)
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

#ifndef COUNT
#define COUNT(mask) NAME(count)(mask)
#define ANY(mask) NAME(count)(mask)
TARGET static inline long NAME(count)(VW mask)
{
    uint64_t words[sizeof mask / 8], sum = 0;
    memcpy(words, &mask, sizeof mask);
    for (unsigned long n = 0; n < sizeof mask / 8; n++)
        sum += words[n] & 0x0001000100010001u;
    return (long)(sum * 0x0001000100010001u >> 48);
}
#endif

/* One bit for each 16-bit lane that is set. */
TARGET static inline uint32_t NAME(marks)(VW mask)
{
    uint16_t lanes[WIDE];
    uint32_t bits = 0;
    memcpy(lanes, &mask, sizeof mask);
    for (int lane = 0; lane < WIDE; lane++)
        bits |= (uint32_t)(lanes[lane] & 1u) << lane;
    return bits;
}

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

/* sum = up . panel for ROWS rows and 2 * LANES columns: CHUNK ranks at a time, the first straight into the sums. */
TARGET static inline __attribute__((always_inline)) void NAME(sums16)(VF (*sum)[2], const float *const *up, const float *panel, long from, long to)
{
    for (int i = 0; i < ROWS; i++)
        sum[i][0] = sum[i][1] = (VF){0};
#pragma GCC unroll 16
    for (long k = from; k < to; k++) {
        VF d0, d1;
        memcpy(&d0, panel + k * WIDE, sizeof d0);
        memcpy(&d1, panel + k * WIDE + LANES, sizeof d1);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            VF u = up[i][k] - (VF){0};
            sum[i][0] = FMA(u, d0, sum[i][0]);
            sum[i][1] = FMA(u, d1, sum[i][1]);
        }
    }
}

#ifndef ROW_OF_BFLOAT
/* One row of a bfloat16 block: 2 * LANES weights as LANES words, whose lower halves are the even columns and upper halves the odd ones.
 *
 * The true sum lies within `reach` of each lane's. An element is certain where both ends of that interval round alike; ends are moved
 * outward by 4 units in the last place of float32 for the rounding of the sum and of the ends themselves. Where both ends agree no tie
 * lies between them, so rounding ties away from zero is as good as to even; ends on two sides of zero never agree. */
TARGET static inline __attribute__((always_inline)) uint32_t NAME(bfloat_row)(uint16_t *w, const VF *sum, float reach, int exact, long *changed)
{
    const VU sign = 0x80000000u - (VU){0}, upper = 0xFFFF0000u - (VU){0};
    VU old;
    memcpy(&old, w, sizeof old);
    VF v0 = (VF)(old << 16) + sum[0], v1 = (VF)(old & upper) + sum[1];
    VU code;
    VW doubt;
    if (exact) {
        const VU bits = (VU)(reach - (VF){0});
        VF s0 = (VF)(((VU)v0 & sign) | bits), s1 = (VF)(((VU)v1 & sign) | bits);
        code = ((VU)(v0 + s0) + 0x8004u) >> 16 | (((VU)(v1 + s1) + 0x8004u) & upper);
        VU low = ((VU)(v0 - s0) + 0x7FFCu) >> 16 | (((VU)(v1 - s1) + 0x7FFCu) & upper);
        doubt = (VW)((VW)code != (VW)low);
    } else {
        code = ((VU)v0 + 0x7FFFu + ((VU)v0 >> 16 & 1u)) >> 16 | (((VU)v1 + 0x7FFFu + ((VU)v1 >> 16 & 1u)) & upper);
        doubt = (VW){0};
    }
    doubt |= (VW)(((VW)code << 1) >= 2 * 0x7F7C); /* nearly too large, too large, or NaN */
    VW kept = ((VW)code & ~doubt) | ((VW)old & doubt), differs = (VW)(kept != (VW)old);
    *changed += COUNT(differs);
    memcpy(w, &kept, sizeof kept);
    return ANY(doubt) ? NAME(marks)(doubt) : 0;
}
#define ROW_OF_BFLOAT NAME(bfloat_row)
#endif

#ifndef ROW_OF_HALF
/* One row of a float16 block, by magnitudes; an end beyond zero carries a sign bit and never agrees. */
TARGET static inline __attribute__((always_inline)) uint32_t NAME(half_row)(uint16_t *w, const VF *sum, float reach, int exact, long *changed)
{
    uint32_t mark = 0;
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
        VH stored;
        memcpy(&stored, w + j * LANES, sizeof stored);
        VU old = __builtin_convertvector(stored, VU);
        VU bits = (VU)(NAME(half_value)(old) + sum[j]);
        VU sign = bits & 0x80000000u;
        VF a = (VF)(bits ^ sign);
        VU doubt = (VU)(a <= 65472.0f) ^ 0xFFFFFFFFu; /* also true for NaN */
        VU code;
        if (exact) {
            VI low = (VI)(a - reach) - 4;
            code = NAME(half_code)((VF)((VI)(a + reach) + 4));
            doubt |= (VU)(NAME(half_code)((VF)low) != code) | (VU)(low < 0);
        } else
            code = NAME(half_code)(a);
        code |= sign >> 16;
#ifndef HALF_UP
        doubt |= (VU)((old & 0x7C00u) == 0x7C00u); /* Inf and NaN came out of half_value as large numbers */
#endif
        code = (code & ~doubt) | (old & doubt);
        *changed += __builtin_popcount(LANE_BITS((VU)(code != old)));
        mark |= (uint32_t)LANE_BITS(doubt) << (j * LANES);
        VH out = NARROW(code);
        memcpy(w + j * LANES, &out, sizeof out);
    }
    return mark;
}
#define ROW_OF_HALF NAME(half_row)
#endif

/* One block of 16-bit weights: w = round(w + up . panel) where that is certain. Doubtful elements keep their old code and are marked. */
TARGET static inline __attribute__((always_inline)) int NAME(block16)(
    uint16_t *const *w, const float *const *up, const float *panel, long rank, const float *reach, int half, int exact, long *changed, uint32_t *marks)
{
    VF sum[ROWS][2], part[ROWS][2];
    if (rank >= CHUNK)
        NAME(sums16)(sum, up, panel, 0, CHUNK); /* of constant length: the compiler unrolls it */
    else
        NAME(sums16)(sum, up, panel, 0, rank);
    for (long from = CHUNK; from < rank; from += CHUNK) {
        NAME(sums16)(part, up, panel, from, from + CHUNK < rank ? from + CHUNK : rank);
        for (int i = 0; i < ROWS; i++) {
            sum[i][0] += part[i][0];
            sum[i][1] += part[i][1];
        }
    }
    uint32_t any = 0;
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
        any |= marks[i] = half ? ROW_OF_HALF(w[i], sum[i], reach[i], exact, changed) : ROW_OF_BFLOAT(w[i], sum[i], reach[i], exact, changed);
    return any != 0;
}

/* The same for float32 weights with sums in float64. */
TARGET static inline __attribute__((always_inline)) int NAME(block32)(
    float *const *w, const double *const *up, const double *panel, long rank, const float *reach, int half, int exact, long *changed, uint32_t *marks)
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
            VFS stored;
            memcpy(&stored, w[i] + j * (LANES / 2), sizeof stored);
            VUS old = (VUS)stored;
            VD value = __builtin_convertvector(stored, VD) + sum[i][j];
            VUL bits = (VUL)value & 0x7FFFFFFFFFFFFFFFu;
            VD a = (VD)bits;
            VFS rounded = __builtin_convertvector(value, VFS);
            VUL unsure = (VUL)((a <= 3.4028e38) & (a >= 1.1754943508222875e-38)) ^ 0xFFFFFFFFFFFFFFFFu;
            if (exact) {
                VD mid = (VD)((bits & ~0x1FFFFFFFull) | 0x10000000ull);
                VD bound = reach[i] * 3.725290298461914e-09 + a * 4.44e-16; /* 2^-28: from float32's unit to twice float64's */
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

/* One element becomes round(W + sum_k up[row, k] * down[k, column]), summed in float64. The order is fixed, and the numpy path uses the
 * same: eight running sums over k = 0, 8, 16 ...; 1, 9, 17 ... and so on, then ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)). This file is
 * compiled without contraction, so no product is fused. */
TARGET static __attribute__((noinline)) void NAME(settle)(const Tile *tile, long row, long column, long *changed, long *infinite)
{
    const long rank = tile->rank, at = column * EIGHTS(rank), whole = rank / 8 * 8;
    const double *u = tile->up64 + row * rank;
    double s[8] = {0};
    if (tile->wide) {
        const double *d = (const double *)tile->downs + at;
        for (long k = 0; k < whole; k += 8)
            for (int lane = 0; lane < 8; lane++)
                s[lane] += u[k + lane] * d[k + lane];
        for (long k = whole; k < rank; k++)
            s[k - whole] += u[k] * d[k];
    } else {
        const float *d = (const float *)tile->downs + at;
        for (long k = 0; k < whole; k += 8)
            for (int lane = 0; lane < 8; lane++)
                s[lane] += u[k + lane] * (double)d[k + lane];
        for (long k = whole; k < rank; k++)
            s[k - whole] += u[k] * (double)d[k];
    }
    add_and_round(tile, row * tile->columns + column, ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])), changed, infinite);
}

/* Line one uncertain element up, its factors on their way to the cache, and settle the one that has waited longest. */
TARGET static __attribute__((noinline)) void NAME(wait)(Waiting *waiting, long row, long column, long *changed, long *infinite)
{
    const Tile *tile = waiting->tile;
    const long rank = EIGHTS(tile->rank), size = rank * (tile->wide ? 8 : 4);
    const char *d = (const char *)tile->downs + column * size, *u = (const char *)(tile->up64 + row * tile->rank);
    for (long at = 0; at < size; at += 64)
        __builtin_prefetch(d + at);
    for (long at = 0; at < tile->rank * 8; at += 64)
        __builtin_prefetch(u + at);
    Place *place = &waiting->place[waiting->next++ % WAITING], old = *place;
    *place = (Place){row, column};
    if (old.row >= 0)
        NAME(settle)(tile, old.row, old.column, changed, infinite);
}

/* Panels are taken in groups that fit the first-level cache beside what they change, so that a row's bytes are met in runs of several
 * cache lines: at a stride of 4 KiB single lines would all fight for one cache set. */
#define TILE(function, block, element, factor, width)                                                                                   \
    TARGET static void NAME(function)(const Tile *tile, int exact, long *changed_out, long *infinite_out)                                \
    {                                                                                                                                   \
        const long rows = tile->rows, columns = tile->columns, rank = tile->rank;                                                       \
        const factor *up = tile->up, *panels = tile->panels;                                                                            \
        const int half = tile->kind == HALF;                                                                                            \
        element *stored = tile->stored;                                                                                                 \
        long changed = 0, group = GROUP_BYTES / (width * (long)sizeof(factor) * (rank ? rank : 1));                                     \
        group = (group < 1 ? 1 : group) * width;                                                                                        \
        uint32_t marks[ROWS];                                                                                                           \
        element edge[ROWS][width];                                                                                                      \
        element *w[ROWS];                                                                                                               \
        const factor *u[ROWS];                                                                                                          \
        float reach[ROWS];                                                                                                              \
        Waiting waiting = {.tile = tile};                                                                                               \
        for (int n = 0; n < WAITING; n++)                                                                                               \
            waiting.place[n].row = -1;                                                                                                  \
        for (long first = 0; first < columns; first += group) {                                                                         \
            long last = columns - first < group ? columns : first + group;                                                              \
            for (long i = 0; i < rows; i += ROWS) {                                                                                     \
                long high = rows - i < ROWS ? rows - i : ROWS;                                                                          \
                for (long r = 0; r < ROWS; r++)                                                                                         \
                    u[r] = up + (i + (r < high ? r : 0)) * rank;                                                                        \
                for (long j = first; j < last; j += width) {                                                                            \
                    const factor *panel = panels + j * rank;                                                                            \
                    long wide = columns - j < width ? columns - j : width;                                                              \
                    int whole = high == ROWS && wide == width;                                                                          \
                    if (!whole)                                                                                                         \
                        memset(edge, 0, sizeof edge);                                                                                   \
                    for (long r = 0; r < ROWS; r++) {                                                                                   \
                        w[r] = whole ? stored + (i + r) * columns + j : edge[r];                                                        \
                        reach[r] = tile->row_bound[i + (r < high ? r : 0)] * tile->panel_norm[j / width] + 2e-37f;                      \
                        if (!whole && r < high)                                                                                         \
                            memcpy(edge[r], stored + (i + r) * columns + j, (size_t)wide * sizeof(element));                            \
                    }                                                                                                                   \
                    long before = changed;                                                                                              \
                    int some = half   ? exact ? NAME(block)(w, u, panel, rank, reach, 1, 1, &changed, marks)                            \
                                              : NAME(block)(w, u, panel, rank, reach, 1, 0, &changed, marks)                            \
                               : exact ? NAME(block)(w, u, panel, rank, reach, 0, 1, &changed, marks)                                   \
                                       : NAME(block)(w, u, panel, rank, reach, 0, 0, &changed, marks);                                  \
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
                                    NAME(wait)(&waiting, i + r, j + c, &changed, infinite_out);                                         \
                            }                                                                                                           \
                }                                                                                                                       \
            }                                                                                                                           \
        }                                                                                                                               \
        for (int n = 0; n < WAITING && waiting.place[n].row >= 0; n++)                                                                  \
            NAME(settle)(tile, waiting.place[n].row, waiting.place[n].column, &changed, infinite_out);                                  \
        *changed_out = changed;                                                                                                         \
    }

TILE(tile16, block16, uint16_t, float, WIDE)
TILE(tile32, block32, float, double, LANES)

#undef TILE
#undef WIDE
#undef VF
#undef VU
#undef VI
#undef VH
#undef VW
#undef ROW_OF_BFLOAT
#undef ROW_OF_HALF
#undef VD
#undef VUL
#undef VIL
#undef VFS
#undef VUS
