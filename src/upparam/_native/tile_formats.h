/* The types of weights that tile.c knows, and the rounding of one number: the truth that the vectors of tile_rows.h keep to. */

#include <math.h>

enum { BFLOAT, HALF, SINGLE, E4M3, E5M2, GIVEN = 8 /* with a narrow one: the weights are given in float32, and become that */ };

/* The formats of 8 bits: how far their bits lie above those of a float, the float that moves their exponent to a float's, the float whose unit in
 * the last place is their smallest number, that number's power of 2 times 8 or 4 (from where on they are normal), the largest of their codes that is
 * a number, and the largest number for which both ends of an interval are sure to be numbers. E4M3 (`fn`) has no infinity and saturates. */
#define DROPPED(kind) ((kind) == E4M3 ? 20 : 21)
#define MOVE(kind) ((kind) == E4M3 ? 1.329227995784916e+36f : 5.192296858534828e+33f)
#define LEAST(kind) ((kind) == E4M3 ? 16384.0f : 128.0f)
#define LEAST_BITS(kind) ((kind) == E4M3 ? 0x46800000u : 0x43000000u)
#define NORMAL(kind) ((kind) == E4M3 ? 0.015625f : 6.103515625e-05f)
#define REBIAS(kind) ((kind) == E4M3 ? 120u << 3 : 112u << 2)
#define REBIAS_BITS(kind) (REBIAS(kind) << DROPPED(kind))
#define LAST(kind) ((kind) == E4M3 ? 0x7Eu : 0x7Cu)
#define SURE(kind) ((kind) == E4M3 ? 416.0f : 49152.0f)

/* Rounding of one double (no NaN) to nearest even in a narrow type: to odd in float first, which keeps on which side of a tie it lies.
 * Without branches on signs and sizes, which no processor foresees. */
static inline uint16_t rounded(double value, int kind)
{
    const double magnitude = __builtin_fabs(value);
    const float nearest = (float)magnitude;
    const double back = (double)nearest;
    const int eight = kind == E4M3 || kind == E5M2;
    const uint16_t sign = __builtin_signbit(value) ? (eight ? 0x80u : 0x8000u) : 0;
    uint32_t bits, least, normal;
    float small;
    memcpy(&bits, &nearest, sizeof bits);
    bits = (bits - (back > magnitude)) | (back != magnitude);
    if (kind == BFLOAT)
        return sign | (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
    memcpy(&small, &bits, sizeof small);
    if (kind == HALF) {
        const uint32_t subnormal = bits < 0x38800000u; /* 2^-14 */
        small += 0.5f; /* whose unit in the last place is the spacing of fp16 subnormals */
        memcpy(&least, &small, sizeof least);
        normal = (bits + 0xFFFu + (bits >> 13 & 1u) - (112u << 23)) >> 13;
        normal = normal < 0x7C00u ? normal : 0x7C00u;
        return sign | (uint16_t)(subnormal ? least - 0x3F000000u : normal);
    }
    const int subnormal = small < NORMAL(kind), dropped = DROPPED(kind);
    small += LEAST(kind);
    memcpy(&least, &small, sizeof least);
    normal = ((bits + (1u << (dropped - 1)) - 1u + (bits >> dropped & 1u)) >> dropped) - REBIAS(kind);
    normal = normal < LAST(kind) ? normal : LAST(kind);
    return sign | (uint16_t)(subnormal ? least - LEAST_BITS(kind) : normal);
}

static inline double as_stored(uint16_t code, int kind)
{
    const int eight = kind == E4M3 || kind == E5M2;
    uint32_t bits = kind == BFLOAT ? (uint32_t)code << 16 : eight ? (uint32_t)(code & 0x7Fu) << DROPPED(kind) : (uint32_t)(code & 0x7FFFu) << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    if (kind == BFLOAT)
        return (double)value;
    double wide = (double)value * (eight ? (double)MOVE(kind) : 5.192296858534828e+33); /* 2^120, 2^112 */
    if (kind == HALF && (code & 0x7C00u) == 0x7C00u)
        wide = (code & 0x3FFu) ? __builtin_nan("") : __builtin_inf();
    if (eight && (code & 0x7Fu) > (kind == E4M3 ? 0x7Eu : 0x7Bu))
        wide = (code & 0x7Fu) == 0x7Cu ? __builtin_inf() : __builtin_nan("");
    return __builtin_copysign(wide, code & (eight ? 0x80u : 0x8000u) ? -1.0 : 1.0);
}
