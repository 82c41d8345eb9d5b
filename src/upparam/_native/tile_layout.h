/* How factors are laid out for the tile kernels of one instruction set. Included by tile.c with NAME, TARGET and LANES as for tile_kernels.h.
 *
 * Factors come as they are stored, floats or doubles, and those of several adapters side by side: a part's ranks begin at `at` of `rank`.
 * One pass reads a part, writes it, and adds its squares up in double: `squares` holds for every row of up, or column of down, the sum
 * weighted by weights[k] and behind those the plain one. The answer is whether what was written holds every value. */

#define PUT(layout, field, at, value) ((layout)->wide_to ? (void)(((double *)(layout)->field)[at] = (value)) : (void)(((float *)(layout)->field)[at] = (float)(value)))
#define FROM(layout, at) ((layout)->wide ? ((const double *)(layout)->from)[at] : (double)((const float *)(layout)->from)[at])

/* Up to eight elements of row i of up, from column k on. */
TARGET static inline __attribute__((always_inline)) void NAME(up_part)(const Layout *layout, long i, long k, size_t count, Eight *weighted, Eight *plain, Mask *lost)
{
    const long from = i * layout->columns + k, to = i * EIGHTS(layout->rank) + layout->at + k;
    Eight value = {0}, weights = {0};
    EightFloats narrow = {0};
    if (layout->wide)
        memcpy(&value, (const double *)layout->from + from, count * sizeof(double));
    else {
        memcpy(&narrow, (const float *)layout->from + from, count * sizeof(float));
        value = __builtin_convertvector(narrow, Eight);
    }
    memcpy(&weights, layout->weights + layout->at + k, count * sizeof(double));
    value *= layout->factor;
    if (layout->wide_to)
        memcpy((double *)layout->to + to, &value, count * sizeof(double));
    else {
        narrow = __builtin_convertvector(value, EightFloats);
        memcpy((float *)layout->to + to, &narrow, count * sizeof(float));
        *lost |= __builtin_convertvector(narrow, Eight) != value;
    }
    value *= value;
    *plain += value;
    *weighted += weights * value;
}

/* up (rows, columns) times `factor` becomes columns `at` and on of a matrix (rows, rank padded to a multiple of 8). */
TARGET static inline __attribute__((always_inline)) int NAME(up_of)(const Layout *given, int wide, int wide_to)
{
    Layout layout = *given;
    layout.wide = wide, layout.wide_to = wide_to;
    const long whole = layout.columns / 8 * 8;
    Mask lost = {0};
    for (long i = 0; i < layout.rows; i++) {
        Eight weighted = {0}, plain = {0};
        for (long k = 0; k < whole; k += 8)
            NAME(up_part)(&layout, i, k, 8, &weighted, &plain, &lost);
        if (whole < layout.columns)
            NAME(up_part)(&layout, i, whole, (size_t)(layout.columns - whole), &weighted, &plain, &lost);
        layout.squares[i] += SUM(weighted);
        layout.squares[layout.rows + i] += SUM(plain);
    }
    return SUM(lost) == 0;
}

/* One row of a panel, from element `at` of down, or from `edge`. */
TARGET static inline __attribute__((always_inline)) long NAME(panel_row)(
    const Layout *layout, long at, const double *edge, long to, long width, double weight, double *weighted, double *plain)
{
    const long half = width / 2;
    long inexact = 0;
    for (long c = 0; c < width; c++) {
        double value = edge ? edge[c] : FROM(layout, at + c), square = value * value;
        inexact |= !layout->wide_to & ((double)(float)value != value);
        plain[c] += square;
        weighted[c] += weight * square;
    }
    for (long c = 0; !layout->split && c < width; c++)
        PUT(layout, to, to + c, edge ? edge[c] : FROM(layout, at + c));
    for (long c = 0; layout->split && c < half; c++) {
        PUT(layout, to, to + c, edge ? edge[2 * c] : FROM(layout, at + 2 * c));
        PUT(layout, to, to + half + c, edge ? edge[2 * c + 1] : FROM(layout, at + 2 * c + 1));
    }
    return inexact;
}

/* down (rows, columns) becomes ranks `at` and on of panels (count, rank, width), the last one padded with zeros; with `split` the even
 * columns of a panel come before the odd ones. It also becomes those columns of `downs`, (columns, rank padded to a multiple of 8), where a
 * column's ranks lie together. Eight ranks at a time: rows that lie a power of two apart push each other out of the cache. */
TARGET static inline __attribute__((always_inline)) int NAME(down_of)(const Layout *given, int wide, int wide_to, int split, long width)
{
    Layout layout = *given;
    layout.wide = wide, layout.wide_to = wide_to, layout.split = split;
    long inexact = 0;
    for (long first = 0; first < layout.rows; first += 8)
        for (long column = 0; column < layout.columns; column += width) {
            const long last = layout.rows - first < 8 ? layout.rows : first + 8, some = layout.columns - column < width ? layout.columns - column : width;
            double *const weighted_sums = layout.squares + column, *const plain_sums = layout.squares + layout.columns + column;
            double weighted[WIDEST] = {0}, plain[WIDEST] = {0}, edge[WIDEST] = {0};
            for (long k = first; k < last; k++) {
                const long from = k * layout.columns + column, to = column * layout.rank + (layout.at + k) * width;
                const double weight = layout.weights[layout.at + k];
                if (some == width) {
                    inexact |= NAME(panel_row)(&layout, from, 0, to, width, weight, weighted, plain);
                    continue;
                }
                for (long c = 0; c < some; c++)
                    edge[c] = FROM(&layout, from + c);
                inexact |= NAME(panel_row)(&layout, from, edge, to, width, weight, weighted, plain);
            }
            for (long c = 0; c < some; c++) {
                weighted_sums[c] += weighted[c];
                plain_sums[c] += plain[c];
                for (long k = first; k < last; k++)
                    PUT(&layout, downs, (column + c) * EIGHTS(layout.rank) + layout.at + k, FROM(&layout, k * layout.columns + column + c));
            }
        }
    return !inexact;
}

TARGET static int NAME(lay_up)(const Layout *layout)
{
    return layout->wide_to ? (layout->wide ? NAME(up_of)(layout, 1, 1) : NAME(up_of)(layout, 0, 1))
                           : (layout->wide ? NAME(up_of)(layout, 1, 0) : NAME(up_of)(layout, 0, 0));
}

TARGET static int NAME(lay_down)(const Layout *layout)
{
    if (layout->wide_to)
        return layout->wide ? NAME(down_of)(layout, 1, 1, 0, LANES) : NAME(down_of)(layout, 0, 1, 0, LANES);
    if (layout->split)
        return layout->wide ? NAME(down_of)(layout, 1, 0, 1, 2 * LANES) : NAME(down_of)(layout, 0, 0, 1, 2 * LANES);
    return layout->wide ? NAME(down_of)(layout, 1, 0, 0, 2 * LANES) : NAME(down_of)(layout, 0, 0, 0, 2 * LANES);
}

#undef PUT
#undef FROM
