/* The tile kernels for one instruction set. Included once per set by tile.c with
 *   NAME(x)   the name of a function for this set
 *   TARGET    the function attribute that turns the set on
 *   LANES     floats in one vector
 *   LANE_BITS(mask)   one bit for each lane of a comparison, NARROW(codes) 32-bit codes as 16-bit ones
 *   COUNT(mask), ANY(mask), MARKS(mask)   how many 16-bit lanes are set, whether one is, one bit for each
 *   ROW_OF_BFLOAT, ROW_OF_HALF   what a block does to one row, where the set has a better way than the ones below
 *   HALF_UP / HALF_DOWN   fp16 conversion by instruction; when absent by integer arithmetic
 *
 *   FMA / FMAD   a * b + c of float and double vectors, fused where the set has it
 *
 * Sums run over CHUNK ranks at a time and the partial sums are added up: their error grows with CHUNK + R / CHUNK instead of R.
 *
 * A block is ROWS rows by 2 * LANES columns. `down` comes packed in panels of 2 * LANES columns, so that the R values a block needs
 * lie together and never fight for the same cache sets; for bfloat16 the even columns of a panel come before the odd ones.
 */

/* A block of narrow weights whose sums are known and whose weights are still to be changed. */
typedef struct {
    VF sum[ROWS][2];
    void *w[ROWS];
    const float *given[ROWS];
    float reach[ROWS];
    long row, column;
} NAME(Held);

/* Change row i of a held block: w = round(w + sum) where that is certain. Doubtful elements keep their old code and are marked. */
TARGET static inline __attribute__((always_inline)) uint32_t NAME(finish_row)(const NAME(Held) *held, int i, int kind, int exact, long *changed)
{
    if (kind == BFLOAT)
        return ROW_OF_BFLOAT(held->w[i], held->sum[i], held->reach[i], exact, changed);
    if (kind == HALF)
        return ROW_OF_HALF(held->w[i], held->sum[i], held->reach[i], exact, changed);
    return NAME(narrow_row)(held->w[i], held->given[i], held->sum[i], held->reach[i], kind, exact, changed);
}

/* sum = up . panel for ROWS rows and 2 * LANES columns, over the ranks from `from` to `to`. A block that is held is finished meanwhile, row
 * by row: what rounds and what multiplies are different units of a processor, and one block alone keeps only one of them busy. */
TARGET static inline __attribute__((always_inline)) void NAME(sums)(
    VF (*sum)[2], const float *const *up, const float *panel, long from, long to, const NAME(Held) *held, int kind, int exact, long *changed, uint32_t *marks)
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
        if (held && k * ROWS / CHUNK != (k + 1) * ROWS / CHUNK)
            marks[k * ROWS / CHUNK] = NAME(finish_row)(held, (int)(k * ROWS / CHUNK), kind, exact, changed);
    }
}

/* The sums of one block of narrow weights, CHUNK ranks at a time, while the block before is finished. */
TARGET static inline __attribute__((always_inline)) void NAME(block_narrow)(
    VF (*sum)[2], const float *const *up, const float *panel, long rank, const NAME(Held) *held, int kind, int exact, long *changed, uint32_t *marks)
{
    VF part[ROWS][2];
    if (rank >= CHUNK)
        NAME(sums)(sum, up, panel, 0, CHUNK, held, kind, exact, changed, marks); /* of constant length: the compiler unrolls it */
    else {
        NAME(sums)(sum, up, panel, 0, rank, 0, kind, exact, changed, marks);
#pragma GCC unroll 8
        for (int i = 0; held && i < ROWS; i++)
            marks[i] = NAME(finish_row)(held, i, kind, exact, changed);
    }
    for (long from = CHUNK; from < rank; from += CHUNK) {
        NAME(sums)(part, up, panel, from, from + CHUNK < rank ? from + CHUNK : rank, 0, kind, exact, changed, marks);
        for (int i = 0; i < ROWS; i++) {
            sum[i][0] += part[i][0];
            sum[i][1] += part[i][1];
        }
    }
}

/* The same for float32 weights with sums in float64. */
TARGET static inline __attribute__((always_inline)) int NAME(block_single)(
    float *const *w, const double *const *up, const double *panel, long rank, const float *reach, int exact, long *changed, uint32_t *marks)
{
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

/* Factors as doubles, a vector of them from k on. */
TARGET static inline __attribute__((always_inline)) VD NAME(doubles)(const void *from, int wide, long k)
{
    VD whole;
    VFS narrow;
    if (wide) {
        memcpy(&whole, (const double *)from + k, sizeof whole);
        return whole;
    }
    memcpy(&narrow, (const float *)from + k, sizeof narrow);
    return __builtin_convertvector(narrow, VD);
}

/* sum_k up[k] * down[k] in float64. The order is fixed, and the numpy path uses the same: eight running sums over k = 0, 8, 16 ...;
 * 1, 9, 17 ... and so on, then ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)). This file is compiled without contraction: no product is fused. */
TARGET static inline __attribute__((always_inline)) double NAME(in_order)(const void *up, int wide_up, const void *down, int wide_down, long padded)
{
    VD sums[16 / LANES] = {{0}};
    double s[8];
    for (long k = 0; k < padded; k += 8)
        for (int part = 0; part < 16 / LANES; part++) {
            const long at = k + part * (LANES / 2);
            sums[part] += NAME(doubles)(up, wide_up, at) * NAME(doubles)(down, wide_down, at);
        }
    memcpy(s, sums, sizeof s);
    return SUM(s);
}

/* Elements become round(W + up @ down), summed in float64. */
TARGET static inline __attribute__((always_inline)) void NAME(settle_in)(const Tile *tile, const Doubts *doubts, int kind, int wide_up, int wide_down, long *changed, long *infinite)
{
    const long padded = EIGHTS(tile->rank);
    const char *ups = wide_up && kind != SINGLE ? (const char *)tile->up64 : tile->up, *downs = tile->downs;
    for (long n = 0; n < doubts->count; n++) {
        const long row = doubts->at[n].row;
        uint32_t mark = doubts->at[n].mark;
        do {
            const long column = doubts->at[n].column + __builtin_ctz(mark);
            const double sum = NAME(in_order)(ups + row * padded * (wide_up ? 8 : 4), wide_up, downs + column * padded * (wide_down ? 8 : 4), wide_down, padded);
            add_and_round(tile, kind, row * tile->columns + column, sum, changed, infinite);
            mark &= mark - 1;
        } while (mark);
    }
}

/* The same for every kind and form of the factors; the places are forgotten. Many at a time: what one waits for, the next is begun meanwhile. */
TARGET static __attribute__((noinline)) void NAME(settle)(const Tile *tile, Doubts *doubts, long *changed, long *infinite)
{
    const int kind = tile->kind, wide_up = tile->up64 != 0, wide_down = tile->wide_downs;
    if (kind == SINGLE)
        NAME(settle_in)(tile, doubts, SINGLE, 1, 1, changed, infinite);
    else if (wide_up || wide_down)
        NAME(settle_in)(tile, doubts, kind, wide_up, wide_down, changed, infinite);
    else if (kind == BFLOAT)
        NAME(settle_in)(tile, doubts, BFLOAT, 0, 0, changed, infinite);
    else if (kind == HALF)
        NAME(settle_in)(tile, doubts, HALF, 0, 0, changed, infinite);
    else
        NAME(settle_in)(tile, doubts, kind, 0, 0, changed, infinite);
    doubts->count = 0;
}

/* A block's doubtful elements are put with those to be settled. Which rows have some no processor foresees, nor, of float16, which blocks: no
 * branch depends on it. */
TARGET static inline __attribute__((always_inline)) void NAME(put_aside)(
    const Tile *tile, Doubts *doubts, int kind, const uint32_t *marks, long rows, long row, long column, long wide, long *changed, long *infinite)
{
    const uint32_t within = (uint32_t)((1ull << wide) - 1);
    uint32_t any = 0;
    for (long r = 0; r < rows; r++)
        any |= marks[r];
    if ((kind & ~GIVEN) != HALF && !any)
        return;
    for (long r = 0; r < rows; r++) {
        doubts->at[doubts->count] = (Doubt){(int32_t)(row + r), (int32_t)column, marks[r] & within};
        doubts->count += (marks[r] & within) != 0;
    }
    if (doubts->count > DOUBTS - ROWS)
        NAME(settle)(tile, doubts, changed, infinite);
}

/* Finish the block that is held, if one is. */
TARGET static inline __attribute__((always_inline)) void NAME(finish)(
    NAME(Held) *held, const Tile *tile, Doubts *doubts, int kind, int exact, long *changed, long *infinite)
{
    uint32_t marks[ROWS];
    if (held->row < 0)
        return;
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
        marks[i] = NAME(finish_row)(held, i, kind, exact, changed);
    NAME(put_aside)(tile, doubts, kind, marks, ROWS, held->row, held->column, WIDE, changed, infinite);
    held->row = -1;
}

/* Panels are taken in groups that fit the first-level cache beside what they change, so that a row's bytes are met in runs of several
 * cache lines: at a stride of 4 KiB single lines would all fight for one cache set. */
TARGET static inline __attribute__((always_inline)) void NAME(tile_of)(const Tile *tile, int kind, int exact, long *changed_out, long *infinite_out)
{
    const long rows = tile->rows, columns = tile->columns, rank = tile->rank, group = GROUP(WIDE * sizeof(float), rank) * WIDE;
    const float *up = tile->up, *panels = tile->panels, *u[ROWS];
    const long size = EIGHT(kind & ~GIVEN) ? 1 : 2;
    float beyond[ROWS][WIDE];
    char *stored = tile->stored, edge[ROWS][2 * WIDE];
    long changed = 0, uncounted = 0;
    uint32_t marks[ROWS];
    NAME(Held) held = {.row = -1}, partial;
    Doubts doubts = {.count = 0};
    VF sum[ROWS][2];
    for (long first = 0; first < columns; first += group) {
        long last = columns - first < group ? columns : first + group;
        for (long i = 0; i < rows; i += ROWS) {
            long high = rows - i < ROWS ? rows - i : ROWS;
            for (long r = 0; r < ROWS; r++)
                u[r] = up + (i + (r < high ? r : 0)) * EIGHTS(rank);
            for (long j = first; j < last; j += WIDE) {
                const float *panel = panels + j * rank;
                const float norm = tile->panel_norm[j / WIDE];
                long wide = columns - j < WIDE ? columns - j : WIDE;
                if (high == ROWS && wide == WIDE) {
                    if (held.row >= 0) {
                        NAME(block_narrow)(sum, u, panel, rank, &held, kind, exact, &changed, marks);
                        NAME(put_aside)(tile, &doubts, kind, marks, ROWS, held.row, held.column, WIDE, &changed, infinite_out);
                    } else
                        NAME(block_narrow)(sum, u, panel, rank, 0, kind, exact, &changed, marks);
                    memcpy(held.sum, sum, sizeof sum);
                    for (long r = 0; r < ROWS; r++) {
                        held.w[r] = stored + ((i + r) * columns + j) * size;
                        held.given[r] = tile->given + (kind & GIVEN ? (i + r) * columns + j : 0);
                        held.reach[r] = tile->row_bound[i + r] * norm + TINY;
                    }
                    held.row = i;
                    held.column = j;
                    continue;
                }
                memset(edge, 0, sizeof edge);
                memset(beyond, 0, sizeof beyond);
                NAME(block_narrow)(partial.sum, u, panel, rank, 0, kind, exact, &changed, marks);
                for (long r = 0; r < ROWS; r++) {
                    partial.w[r] = edge[r];
                    partial.given[r] = beyond[r];
                    partial.reach[r] = tile->row_bound[i + (r < high ? r : 0)] * norm + TINY;
                    if (r < high && kind & GIVEN)
                        memcpy(beyond[r], tile->given + (i + r) * columns + j, (size_t)wide * sizeof(float));
                    else if (r < high)
                        memcpy(edge[r], stored + ((i + r) * columns + j) * size, (size_t)(wide * size));
                }
                for (int r = 0; r < ROWS; r++)
                    marks[r] = NAME(finish_row)(&partial, r, kind, exact, kind & GIVEN && r < high ? &changed : &uncounted); /* padding must not count */
                for (long r = 0; r < high; r++)
                    for (long c = 0; c < wide; c++) {
                        char *place = stored + ((i + r) * columns + j + c) * size;
                        changed += !(kind & GIVEN) && memcmp(place, edge[r] + c * size, (size_t)size) != 0;
                        memcpy(place, edge[r] + c * size, (size_t)size);
                    }
                NAME(put_aside)(tile, &doubts, kind, marks, high, i, j, wide, &changed, infinite_out);
            }
        }
        NAME(finish)(&held, tile, &doubts, kind, exact, &changed, infinite_out);
        NAME(settle)(tile, &doubts, &changed, infinite_out); /* while these panels are in the cache */
    }
    *changed_out = changed;
}

/* A function of its own for each: of a single one as large as all together the compiler makes a much slower one. */
#define TILE(name, kind, exact)                                                                                      \
    TARGET static __attribute__((noinline)) void NAME(name)(const Tile *tile, long *changed, long *infinite)         \
    {                                                                                                                \
        NAME(tile_of)(tile, kind, exact, changed, infinite);                                                         \
    }
TILE(bfloat_exact, BFLOAT, 1)
TILE(bfloat_quick, BFLOAT, 0)
TILE(bfloat_given, BFLOAT | GIVEN, 1)
TILE(half_exact, HALF, 1)
TILE(half_quick, HALF, 0)
TILE(half_given, HALF | GIVEN, 1)
TILE(e4m3_exact, E4M3, 1)
TILE(e4m3_quick, E4M3, 0)
TILE(e4m3_given, E4M3 | GIVEN, 1)
TILE(e5m2_exact, E5M2, 1)
TILE(e5m2_quick, E5M2, 0)
TILE(e5m2_given, E5M2 | GIVEN, 1)
#undef TILE

TARGET static void NAME(tile_narrow)(const Tile *tile, int exact, long *changed, long *infinite)
{
    static void (*const functions[][3])(const Tile *, long *, long *) = {
        [BFLOAT] = {NAME(bfloat_quick), NAME(bfloat_exact), NAME(bfloat_given)},
        [HALF] = {NAME(half_quick), NAME(half_exact), NAME(half_given)},
        [E4M3] = {NAME(e4m3_quick), NAME(e4m3_exact), NAME(e4m3_given)},
        [E5M2] = {NAME(e5m2_quick), NAME(e5m2_exact), NAME(e5m2_given)},
    };
    functions[tile->kind][tile->given ? 2 : exact != 0](tile, changed, infinite);
}

TARGET static void NAME(tile_single)(const Tile *tile, int exact, long *changed_out, long *infinite_out)
{
    const long rows = tile->rows, columns = tile->columns, rank = tile->rank, group = GROUP(LANES * sizeof(double), rank) * LANES;
    const double *up = tile->up, *panels = tile->panels, *u[ROWS];
    float *stored = tile->stored, edge[ROWS][LANES], *w[ROWS], reach[ROWS];
    long changed = 0;
    uint32_t marks[ROWS];
    Doubts doubts = {.count = 0};
    for (long first = 0; first < columns; first += group) {
        long last = columns - first < group ? columns : first + group;
        for (long i = 0; i < rows; i += ROWS) {
            long high = rows - i < ROWS ? rows - i : ROWS;
            for (long r = 0; r < ROWS; r++)
                u[r] = up + (i + (r < high ? r : 0)) * EIGHTS(rank);
            for (long j = first; j < last; j += LANES) {
                const double *panel = panels + j * rank;
                long wide = columns - j < LANES ? columns - j : LANES, before = changed;
                int whole = high == ROWS && wide == LANES;
                if (!whole)
                    memset(edge, 0, sizeof edge);
                for (long r = 0; r < ROWS; r++) {
                    w[r] = whole ? stored + (i + r) * columns + j : edge[r];
                    reach[r] = tile->row_bound[i + (r < high ? r : 0)] * tile->panel_norm[j / LANES] + TINY;
                    if (!whole && r < high)
                        memcpy(edge[r], stored + (i + r) * columns + j, (size_t)wide * sizeof **edge);
                }
                int some = exact ? NAME(block_single)(w, u, panel, rank, reach, 1, &changed, marks) : NAME(block_single)(w, u, panel, rank, reach, 0, &changed, marks);
                if (!whole) {
                    changed = before; /* padding must not count */
                    for (long r = 0; r < high; r++)
                        for (long c = 0; c < wide; c++) {
                            float *place = stored + (i + r) * columns + j + c;
                            changed += memcmp(place, &edge[r][c], sizeof *place) != 0;
                            *place = edge[r][c];
                        }
                }
                if (some)
                    NAME(put_aside)(tile, &doubts, SINGLE, marks, high, i, j, wide, &changed, infinite_out);
            }
        }
        NAME(settle)(tile, &doubts, &changed, infinite_out);
    }
    *changed_out = changed;
}

#undef WIDE
#undef VF
#undef VU
#undef VI
#undef VH
#undef VB
#undef VW
#undef ROW_OF_BFLOAT
#undef ROW_OF_HALF
#undef VD
#undef VUL
#undef VIL
#undef VFS
#undef VUS
