// Compares the lines of dots.h with a plain loop over K: rows times 16 outputs, int8 and bfloat16, with two lengths; and
// the groups of 4 bits with the formula of each weight.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "dots.h"

using namespace dots;

std::mt19937 draw(1);
int level() { return (int)(draw() % 255) - 127; }

int wrong_integers(int K) {
  std::vector<int> weights(STRIP * K), row(K);
  for (int& value : weights) value = level();
  for (int& value : row) value = level();
  std::vector<char> packed(STRIP * K);
  for (int n = 0; n < STRIP; n++)
    for (int k = 0; k < K; k++) packed[k / 4 * LINE + n * 4 + k % 4] = (char)(weights[n * K + k] + 128);
  std::vector<Int8::Row> placed(K);
  int total = 0, wrong = 0;
  for (int k = 0; k < K; k += 4) {
    int8_t four[4];
    for (int j = 0; j < 4; j++) total += four[j] = (int8_t)row[k + j];
    Int8::place(placed.data() + k, four);
  }
  Int8::Sum sum = {};
  for (int k = 0; k < K; k += 4)
    Int8::dot(sum, Int8::spread(placed.data() + k), Int8::weights(load_line(packed.data() + k / 4 * LINE)));
  for (int n = 0; n < STRIP; n++) {
    int expected = Int8::OFFSET ? 128 * total : 0;
    for (int k = 0; k < K; k++) expected += weights[n * K + k] * row[k];
    wrong += sum.part[n / W][n % W] != expected;
  }
  return wrong;
}

int wrong_floats(int K) {
  std::vector<c10::BFloat16> packed(STRIP * K);
  std::vector<float> weights(STRIP * K), row(K);
  for (int k = 0; k < K; k++) row[k] = level() / 8.f;
  std::vector<Bfloat16::Row> rows(row.begin(), row.end());
  for (int n = 0; n < STRIP; n++)
    for (int k = 0; k < K; k++) weights[n * K + k] = packed[k / 2 * 32 + n * 2 + k % 2] = level() / 64.f;
  Bfloat16::Sum sum = {};
  for (int k = 0; k < K; k += 2)
    Bfloat16::dot(sum, Bfloat16::spread(rows.data() + k), Bfloat16::weights(load_line((const char*)(packed.data() + k / 2 * 32))));
  int wrong = 0;
  for (int n = 0; n < STRIP; n++) {
    double expected = 0;
    for (int k = 0; k < K; k++) expected += (double)weights[n * K + k] * row[k];
    wrong += !(std::fabs(sum.part[n / W][n % W] - expected) <= 1e-4 * (1 + std::fabs(expected)));
  }
  return wrong;
}

int wrong_groups() {
  std::vector<char> group(Int4Group::BYTES);
  for (char& value : group) value = (char)draw();
  // Without overflow: 15 * 127 / 8 + 15 is below 256.
  for (int n = 0; n < STRIP; n++) group[2 * n] = (char)(draw() % 128), group[2 * n + 1] = (char)(draw() % 16);
  const Int4Group read(group.data());
  int wrong = 0;
  for (int line = 0; line < Int4Group::LINES; line++) {
    const char* from = group.data() + 2 * STRIP + line * LINE;
    char unpacked[2][LINE];
    store_line(unpacked[0], read.low(load_line(from)));
    store_line(unpacked[1], read.high(load_line(from)));
    for (int i = 0; i < 2 * LINE; i++) {
      const int n = i % LINE / 4, level = (uint8_t)from[i % LINE] >> (i < LINE ? 0 : 4) & 15;
      wrong += (uint8_t)unpacked[i / LINE][i % LINE] != level * (uint8_t)group[2 * n] / 8 + (uint8_t)group[2 * n + 1];
    }
  }
  return wrong;
}

int main() {
  int wrong = wrong_groups(), values = 2 * LINE * Int4Group::LINES;
  for (int K : {4, 64})
    for (int row = 0; row < 3; row++, values += 2 * STRIP) wrong += wrong_integers(K) + wrong_floats(K);
  std::printf("%d of %d values are wrong\n", wrong, values);
  return wrong != 0;
}
