/* How two spaces lie to each other, from the inner products of rows that span them: included by gram_kernels.h for double, whose macros it uses.
 *
 * Matrices lie in rows of `stride` doubles, a multiple of BAND (gram.c), whose surplus is zero.
 */

/* Lower Cholesky factor (count, count) of products that were divided by the lengths of the rows; 0 where rows may be dependent. */
TARGET static int NAME(cholesky)(double *lower, double *upper, long count, long stride, double least)
{
    double low = 1, high = 0;
    for (long k = 0; k < count; k++) {
        double *row = upper + k * stride, pivot = row[k];
        if (!(pivot > 0) || !(pivot < 1e300))
            return 0;
        pivot = sqrt(pivot);
        low = pivot < low ? pivot : low;
        high = pivot > high ? pivot : high;
        for (long j = k; j < count; j++)
            lower[j * stride + k] = row[j] /= pivot;
        for (long i = k + 1; i < count; i++) {
            NAME(vector) by = row[i] - (NAME(vector)){0};
            for (long j = i / LANES * LANES; j < count; j += LANES) {
                NAME(vector) one, other;
                memcpy(&one, upper + i * stride + j, sizeof one);
                memcpy(&other, row + j, sizeof other);
                one = FMA(-by, other, one);
                memcpy(upper + i * stride + j, &one, sizeof one);
            }
        }
    }
    return low > least * high;
}

/* matrix (count, width) becomes lower^-1 matrix; BAND columns at a time stay in the first-level cache. */
TARGET static void NAME(solve)(double *matrix, long width, const double *lower, long count, long stride)
{
    for (long from = 0; from < width; from += BAND)
        for (long i = 0; i < count; i++) {
            NAME(vector) sum[BAND / LANES];
            memcpy(sum, matrix + i * width + from, sizeof sum);
            for (long k = 0; k < i; k++) {
                NAME(vector) by = lower[i * stride + k] - (NAME(vector)){0}, line[BAND / LANES];
                memcpy(line, matrix + k * width + from, sizeof line);
                for (int part = 0; part < BAND / LANES; part++)
                    sum[part] = FMA(-by, line[part], sum[part]);
            }
            NAME(vector) whole = lower[i * stride + i] - (NAME(vector)){0};
            for (int part = 0; part < BAND / LANES; part++)
                sum[part] /= whole;
            memcpy(matrix + i * width + from, sum, sizeof sum);
        }
}

/* Householder's reduction of a symmetric matrix, which is used up: its diagonal, and the squares of what lies beside it. */
TARGET static void NAME(tridiagonal)(double *matrix, long count, long stride, double *diagonal, double *squares, double *v, double *w)
{
    for (long k = 0; k < count; k++) {
        double *row = matrix + k * stride, size = 0, slope = 0;
        diagonal[k] = row[k];
        squares[k] = 0;
        for (long j = k + 1; j < count; j++)
            size += row[j] * row[j];
        if (k + 1 >= count || !(size > 0))
            continue;
        squares[k] = size;
        /* v = x -+ |x| e, and the reflection is 1 - v v^T / half. */
        double head = row[k + 1] < 0 ? row[k + 1] - sqrt(size) : row[k + 1] + sqrt(size), half = size + fabs(row[k + 1]) * sqrt(size);
        long from = (k + 1) / LANES * LANES;
        for (long j = from; j < stride; j++)
            v[j] = j <= k ? 0 : row[j];
        v[k + 1] = head;
        for (long i = k + 1; i < count; i++) {
            NAME(vector) sum = {0};
            for (long j = from; j < count; j += LANES) {
                NAME(vector) one, other;
                memcpy(&one, matrix + i * stride + j, sizeof one);
                memcpy(&other, v + j, sizeof other);
                sum = FMA(one, other, sum);
            }
            w[i] = 0;
            for (int lane = 0; lane < LANES; lane++)
                w[i] += sum[lane];
            w[i] /= half;
            slope += w[i] * v[i];
        }
        for (long j = from; j < stride; j++)
            w[j] = j <= k || j >= count ? 0 : w[j] - slope / (2 * half) * v[j];
        for (long i = k + 1; i < count; i++) {
            NAME(vector) first = v[i] - (NAME(vector)){0}, second = w[i] - (NAME(vector)){0};
            for (long j = from; j < count; j += LANES) {
                NAME(vector) here, one, other;
                memcpy(&here, matrix + i * stride + j, sizeof here);
                memcpy(&one, w + j, sizeof one);
                memcpy(&other, v + j, sizeof other);
                here = FMA(-first, one, here);
                here = FMA(-second, other, here);
                memcpy(matrix + i * stride + j, &here, sizeof here);
            }
        }
    }
}

/* The smallest (`last` 0) or largest eigenvalue of a tridiagonal matrix whose eigenvalues lie from 0 to 1, by Sturm's counts for LANES values at a time. */
TARGET static double NAME(extreme)(const double *diagonal, const double *squares, long count, int last)
{
    double low = -1e-9, high = 1 + 1e-9;
    for (int round = 0; round < 64 && high - low > 1e-16; round++) {
        NAME(vector) at, pivot, below = {0};
        for (int lane = 0; lane < LANES; lane++)
            at[lane] = low + (high - low) * (lane + 1) / (LANES + 1);
        for (long k = 0; k < count; k++) {
            /* A pivot of 0 makes the next one infinite, which counts as one below: as the two together should. */
            NAME(vector) beside = (k ? squares[k - 1] + 1e-300 : 0) - (NAME(vector)){0};
            pivot = k ? (diagonal[k] - at) - beside / pivot : diagonal[k] - at;
            for (int lane = 0; lane < LANES; lane++)
                below[lane] += pivot[lane] < 0;
        }
        double from = low, to = high;
        for (int lane = 0; lane < LANES; lane++) {
            if (last ? below[lane] >= count : below[lane] >= 1) {
                to = at[lane];
                break;
            }
            from = at[lane];
        }
        if (from <= low && to >= high)
            break;
        low = from;
        high = to;
    }
    return (low + high) / 2;
}

/* The smallest, the largest and the sum of the squared cosines of the principal angles between the spaces of the first `rows` and of the
 * `others` rows after them whose inner products are given; 0 where rows of one may be dependent. */
TARGET static int NAME(spaces)(double *found, const double *products, long rows, long others, double least, double *space)
{
    long total = rows + others, stride = padded(rows, others), square = stride * stride;
    double *lower = space, *upper = lower + square, *cross = upper + square, *turned = cross + square, *sums = turned + square;
    double *lines = sums + square, *panels = lines + 4 * stride;
    memset(space, 0, (size_t)(5 * square + 4 * stride) * sizeof(double));
    for (long row = 0; row < total; row++)
        lines[row] = sqrt(products[row * total + row]);
    for (int side = 0; side < 2; side++) {
        long first = side ? rows : 0, count = side ? others : rows, width = side ? rows : others;
        double *matrix = side ? turned : cross;
        memset(lower, 0, 2 * (size_t)square * sizeof(double));
        for (long i = 0; i < count; i++) {
            const double *row = products + (first + i) * total;
            for (long j = i; j < count; j++)
                upper[i * stride + j] = row[first + j] / lines[first + i] / lines[first + j];
            for (long j = 0; j < width; j++)
                matrix[i * stride + j] = (side ? cross[j * stride + i] : row[rows + j]) / lines[first + i];
        }
        if (!NAME(cholesky)(lower, upper, count, stride, least))
            return 0;
        NAME(solve)(matrix, stride, lower, count, stride);
    }
    /* turned = (lower2^-1 cross^T lower1^-T): the smaller of its two Gram matrices has the squares for eigenvalues. */
    long count = rows < others ? rows : others;
    Part part = {turned, rows < others ? stride : others, rows < others ? others : stride, sizeof(double), DOUBLE, rows < others};
    long wide = (part.rows + WIDTH - 1) / WIDTH * WIDTH;
    NAME(gram)(sums, wide, &part, 1, panels);
    memset(upper, 0, (size_t)square * sizeof(double));
    found[2] = 0;
    for (long i = 0; i < count; i++) {
        for (long j = i; j < count; j++)
            upper[i * stride + j] = upper[j * stride + i] = sums[i * wide + j];
        found[2] += upper[i * stride + i];
    }
    NAME(tridiagonal)(upper, count, stride, lines, lines + stride, lines + 2 * stride, lines + 3 * stride);
    found[0] = NAME(extreme)(lines, lines + stride, count, 0);
    found[1] = NAME(extreme)(lines, lines + stride, count, 1);
    return 1;
}
