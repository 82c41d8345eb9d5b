/* The types of weights that tile.c knows, and the rounding of one number: the truth that the vectors of tile_rows.h keep to. */

#include <math.h>

enum { BFLOAT, HALF, SINGLE, E4M3, E5M2, GIVEN = 8 /* with a narrow one: the weights are given in float32, and become that */ };

#define EIGHT(kind) ((kind) == E4M3 || (kind) == E5M2)
/* The narrow formats whose numbers are no upper half of a float: how far their bits lie above those of a float, the power of 2 that moves their
 * exponent to a float's, the float whose unit in the last place is their smallest number, and its bits, their smallest normal number, what the
 * exponents differ by, the code of what is too large, the last code of a number, and their signs. E4M3 (`fn`) has no infinity and saturates. */
#define DROPPED(kind) ((kind) == HALF ? 13 : (kind) == E4M3 ? 20 : 21)
#define MOVE(kind) ((kind) == E4M3 ? 1.329227995784916e+36 : 5.192296858534828e+33)
#define LEAST(kind) ((kind) == HALF ? 0.5f : (kind) == E4M3 ? 16384.0f : 128.0f)
#define LEAST_BITS(kind) ((kind) == HALF ? 0x3F000000u : (kind) == E4M3 ? 0x46800000u : 0x43000000u)
#define NORMAL(kind) ((kind) == E4M3 ? 0.015625f : 6.103515625e-05f)
#define REBIAS_BITS(kind) ((kind) == E4M3 ? 120u << 23 : 112u << 23)
#define LAST(kind) ((kind) == HALF ? 0x7C00u : (kind) == E4M3 ? 0x7Eu : 0x7Cu)
#define NUMBERS(kind) ((kind) == HALF ? 0x7BFFu : (kind) == E4M3 ? 0x7Eu : 0x7Bu)
#define SIGN(kind) (EIGHT(kind) ? 0x80u : 0x8000u)
/* The largest number for which both ends of an interval are sure to be numbers; of bfloat16 too. */
#define SURE(kind) ((kind) == BFLOAT ? 3.3e38f : (kind) == HALF ? 65472.0f : (kind) == E4M3 ? 416.0f : 49152.0f)

/* Rounding of one double (no NaN) to nearest even in a narrow type: to odd in float first, which keeps on which side of a tie it lies.
 * Without branches on signs and sizes, which no processor foresees. */
static inline uint16_t rounded(double value, int kind)
{
    const double magnitude = __builtin_fabs(value);
    const float nearest = (float)magnitude;
    const double back = (double)nearest;
    const uint16_t sign = __builtin_signbit(value) ? SIGN(kind) : 0;
    uint32_t bits, least, normal;
    float small;
    memcpy(&bits, &nearest, sizeof bits);
    bits = (bits - (back > magnitude)) | (back != magnitude);
    if (kind == BFLOAT)
        return sign | (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
    memcpy(&small, &bits, sizeof small);
    const int subnormal = small < NORMAL(kind), dropped = DROPPED(kind);
    small += LEAST(kind);
    memcpy(&least, &small, sizeof least);
    normal = (bits + (1u << (dropped - 1)) - 1u + (bits >> dropped & 1u) - REBIAS_BITS(kind)) >> dropped;
    normal = normal < LAST(kind) ? normal : LAST(kind);
    return sign | (uint16_t)(subnormal ? least - LEAST_BITS(kind) : normal);
}

static inline double as_stored(uint16_t code, int kind)
{
    const uint32_t size = code & (SIGN(kind) - 1u), bits = kind == BFLOAT ? (uint32_t)code << 16 : size << DROPPED(kind);
    float value;
    memcpy(&value, &bits, sizeof value);
    if (kind == BFLOAT)
        return (double)value;
    double wide = (double)value * MOVE(kind);
    if (size > NUMBERS(kind))
        wide = size == LAST(kind) ? __builtin_inf() : __builtin_nan("");
    return __builtin_copysign(wide, code & SIGN(kind) ? -1.0 : 1.0);
}
