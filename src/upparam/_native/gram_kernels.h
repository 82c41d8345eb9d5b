/* The Gram matrix of stored rows for one instruction set and one type of products. Included once for each by gram.c with
 *   NAME(x)   the name of a function for this set and type
 *   TARGET    the function attribute that turns the set on
 *   REAL      float or double: what is multiplied
 *   LANES     REALs in one vector
 *   ROWS      rows of a block
 *   FMA       a * b + c of vectors, fused where the set has it
 *   HALF_UP   optional: LANES fp16 codes at an address as a vector
 *   SPACES    optional: what spaces_kernels.h makes of such products is wanted too
 *
 * Rows are widened and packed into panels of 2 * LANES, DEPTH columns at a time: a panel then stays in the first-level cache, all of them
 * in the second. Sums of DEPTH products are in REAL, sums of those in double.
 */

#define WIDTH (2 * LANES)
typedef REAL NAME(vector) __attribute__((vector_size(LANES * sizeof(REAL))));

TARGET static void NAME(widen)(REAL *to, const void *from, long count, int kind)
{
    long at = 0;
    if (kind == HALF) {
        const uint16_t *codes = from;
#ifdef HALF_UP
        for (; at + LANES <= count; at += LANES) {
            NAME(vector) values = HALF_UP(codes + at);
            memcpy(to + at, &values, sizeof values);
        }
#endif
        for (; at < count; at++)
            to[at] = (REAL)half_value(codes[at]);
    } else if (kind == BFLOAT) {
        const uint16_t *codes = from;
        for (; at < count; at++) {
            uint32_t bits = (uint32_t)codes[at] << 16;
            float value;
            memcpy(&value, &bits, sizeof value);
            to[at] = (REAL)value;
        }
    } else if (kind == SINGLE) {
        const float *values = from;
        for (; at < count; at++)
            to[at] = (REAL)values[at];
    } else {
        const double *values = from;
        for (; at < count; at++)
            to[at] = (REAL)values[at];
    }
}

/* Columns [from, from + depth) of a part's rows, which are rows first.. of the whole, into the panels. */
TARGET static void NAME(pack)(REAL *panels, const Part *part, long first, long from, long depth)
{
    const char *stored = part->stored;
    if (part->across) {
        for (long k = 0; k < depth; k++) {
            const char *line = stored + (from + k) * part->rows * part->size;
            for (long row = 0, many; row < part->rows; row += many) {
                long place = (first + row) % WIDTH, panel = (first + row) / WIDTH;
                many = WIDTH - place < part->rows - row ? WIDTH - place : part->rows - row;
                NAME(widen)(panels + (panel * DEPTH + k) * WIDTH + place, line + row * part->size, many, part->kind);
            }
        }
        return;
    }
    REAL line[DEPTH];
    for (long row = 0; row < part->rows; row++) {
        REAL *to = panels + (first + row) / WIDTH * DEPTH * WIDTH + (first + row) % WIDTH;
        NAME(widen)(line, stored + (row * part->columns + from) * part->size, depth, part->kind);
        for (long k = 0; k < depth; k++)
            to[k * WIDTH] = line[k];
    }
}

/* Add the products of ROWS rows of one panel with all rows of another to `sums`, whose lines are `stride` apart. */
TARGET static void NAME(block)(double *sums, long stride, const REAL *some, const REAL *all, long depth)
{
    NAME(vector) sum[ROWS][2] = {0};
    for (long k = 0; k < depth; k++) {
        NAME(vector) one, other;
        memcpy(&one, all + k * WIDTH, sizeof one);
        memcpy(&other, all + k * WIDTH + LANES, sizeof other);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
            NAME(vector) value = some[k * WIDTH + row] - (NAME(vector)){0};
            sum[row][0] = FMA(value, one, sum[row][0]);
            sum[row][1] = FMA(value, other, sum[row][1]);
        }
    }
    for (int row = 0; row < ROWS; row++) {
        REAL line[WIDTH];
        memcpy(line, sum[row], sizeof line);
        for (int column = 0; column < WIDTH; column++)
            sums[row * stride + column] += (double)line[column];
    }
}

/* The upper triangle, in whole panels, of the sums of products of all rows; `stride` is the number of rows padded to whole panels. */
TARGET static void NAME(gram)(double *sums, long stride, const Part *parts, int count, void *space)
{
    REAL *panels = space;
    long columns = parts[0].columns;
    memset(panels, 0, (size_t)(stride * DEPTH) * sizeof(REAL));
    for (long from = 0; from < columns; from += DEPTH) {
        long depth = columns - from < DEPTH ? columns - from : DEPTH, first = 0;
        for (int part = 0; part < count; part++) {
            NAME(pack)(panels, parts + part, first, from, depth);
            first += parts[part].rows;
        }
        for (long panel = 0; panel < stride / WIDTH; panel++)
            for (long row = 0; row < (panel + 1) * WIDTH; row += ROWS)
                NAME(block)(sums + row * stride + panel * WIDTH, stride, panels + row / WIDTH * DEPTH * WIDTH + row % WIDTH, panels + panel * DEPTH * WIDTH, depth);
    }
}

#ifdef SPACES
#include "spaces_kernels.h"
#undef SPACES
#endif

#undef WIDTH
#undef NAME
#undef REAL
#undef LANES
#undef ROWS
#undef FMA
#undef HALF_UP
