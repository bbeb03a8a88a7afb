// Which blocks work on what, and when: plain C++, the same on the host and on the device.
//
// A unit of work is one slice of channels of one level. It wants the blocks whose shared memory
// together holds it; a unit that no grid can hold wants all of them. Units, level by level, are
// packed into waves of at most `num_blocks` wanted blocks. The units of a wave run side by side,
// each on a contiguous range of blocks, and together use all blocks. Every block goes through the
// waves in the same order and waits within a wave only for the blocks of its own unit, all of which
// get there: there is no deadlock as long as all blocks of the grid are resident.
#pragma once

#ifdef __CUDACC__
#define RSFAST_HOST_DEVICE __host__ __device__
#else
#define RSFAST_HOST_DEVICE
#endif

namespace rsfast {

constexpr int kMaxLevels = 8;
constexpr int kVector = 8;                // channels of a thread: 16 bytes of 16-bit numbers
constexpr int kLanes = 8;                 // threads side by side in a row
constexpr int kSlice = kVector * kLanes;  // most channels of a slice: 128 bytes, a cache line

struct Schedule {
  int num_levels;
  int num_slices;          // of each level
  int slice_vectors;       // vectors of a slice; the last slice may have fewer
  int num_blocks;          // of the grid
  int wanted[kMaxLevels];  // blocks for a unit of each level, 1 to num_blocks
};

// The units from (level, slice) up to but without (next_level, next_slice).
struct Wave {
  int level, slice;
  int next_level, next_slice;
  int wanted;  // blocks, of all its units; 0 after the last wave
};

// One unit and its blocks.
struct Unit {
  int level, slice;
  int first_block, num_blocks;
};

RSFAST_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

RSFAST_HOST_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Returns the wave that begins at (level, slice).
RSFAST_HOST_DEVICE inline Wave wave_from(const Schedule& schedule, int level, int slice) {
  Wave wave{level, slice, level, slice, 0};
  while (wave.next_level < schedule.num_levels) {
    const int wanted = schedule.wanted[wave.next_level];
    const int fitting = (schedule.num_blocks - wave.wanted) / wanted;
    const int units = smaller(schedule.num_slices - wave.next_slice, fitting);
    wave.wanted += units * wanted;
    wave.next_slice += units;
    if (wave.next_slice < schedule.num_slices) break;
    wave.next_slice = 0;
    ++wave.next_level;
  }
  return wave;
}

// Returns the unit of a block in a wave. The q-th wanted block of the wave stands for the blocks
// from q * num_blocks / wanted on, so none is left over.
RSFAST_HOST_DEVICE inline Unit unit_of(const Schedule& schedule, const Wave& wave, int block) {
  const int position = ((block + 1) * wave.wanted - 1) / schedule.num_blocks;
  Unit unit{wave.level, wave.slice, 0, 0};
  int before = 0;  // wanted blocks before the level's first unit in this wave
  while (true) {
    const int in_level = (schedule.num_slices - unit.slice) * schedule.wanted[unit.level];
    if (position < before + in_level) break;
    before += in_level;
    unit.slice = 0;
    ++unit.level;
  }
  const int wanted = schedule.wanted[unit.level];
  const int index = (position - before) / wanted;
  unit.slice += index;
  before += index * wanted;
  unit.first_block = before * schedule.num_blocks / wave.wanted;
  unit.num_blocks = (before + wanted) * schedule.num_blocks / wave.wanted - unit.first_block;
  return unit;
}

// Returns the number of waves.
inline int count_waves(const Schedule& schedule) {
  int count = 0;
  for (Wave wave = wave_from(schedule, 0, 0); wave.wanted > 0; ++count) {
    wave = wave_from(schedule, wave.next_level, wave.next_slice);
  }
  return count;
}

// Returns the schedule of levels of `rows[num_levels]` rows and `channels` channels, a multiple of
// kVector, on at most `max_blocks` blocks, each of which holds `rows_on_chip` rows of a slice.
// Blocks that would get fewer than `min_rows` rows of any unit are left out. Slices are of equal
// width, but for the last one: 72 channels are 40 and 32, not 64 and 8.
inline Schedule make_schedule(const int* rows, int num_levels, int channels, int max_blocks,
                              int rows_on_chip, int min_rows) {
  const int vectors = channels / kVector;
  const int parts = ceil_div(vectors, kLanes);
  Schedule schedule{};
  schedule.num_levels = num_levels;
  schedule.slice_vectors = ceil_div(vectors, parts);
  schedule.num_slices = ceil_div(vectors, schedule.slice_vectors);
  for (int level = 0; level < num_levels && schedule.num_blocks < max_blocks; ++level) {
    const int useful = smaller(ceil_div(rows[level], min_rows), max_blocks);
    schedule.num_blocks = smaller(schedule.num_blocks + useful * schedule.num_slices, max_blocks);
  }
  for (int level = 0; level < num_levels; ++level) {
    const int wanted = ceil_div(rows[level], rows_on_chip);
    schedule.wanted[level] = smaller(wanted, schedule.num_blocks);
  }
  return schedule;
}

}  // namespace rsfast
