// 2^f on [-1/2, 1/2], relative error under 2e-7: a minimax polynomial whose constant term is 1, so
// that 2^0 is exactly 1. From the highest power down.
#pragma once

namespace fa::cpu {

inline constexpr float kExp2Polynomial[] = {0.0013264714507386088f, 0.009671512991189957f,
                                            0.05550733953714371f,   0.24022242426872253f,
                                            0.6931470036506653f,    1.0f};
// Added to x > -128, rounds it to an integer and leaves that, biased as an exponent is, in the low
// bits of the mantissa: 1.5 * 2^23 + 127.
inline constexpr float kExp2Magic = 12582912.0f + 127.0f;

}  // namespace fa::cpu
