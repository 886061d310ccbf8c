// A tile of 16-bit values in shared memory, swizzled so that ldmatrix and 16-byte copies are free of bank conflicts.
//
// Columns are cut into slices of 64 (or 32, where 64 does not divide them); a slice is stored row by row, and the
// 16-byte chunks of a row are permuted by XOR with the row number.
#pragma once

#include <stdint.h>

#include "ptx.cuh"

namespace flashmask::sm80 {

template <int kRows_, int kColumns_>
struct SharedTile {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kSliceColumns = kColumns % 64 == 0 ? 64 : 32;
  static constexpr int kSliceChunks = kSliceColumns / 8;
  static constexpr int kSlices = kColumns / kSliceColumns;
  static constexpr int kRowBytes = kSliceColumns * 2;
  static constexpr int kSliceBytes = kRows * kRowBytes;
  static constexpr int kBytes = kSlices * kSliceBytes;
  static_assert(kColumns % kSliceColumns == 0 && kRows % 8 == 0);

  static __device__ __forceinline__ int swizzle(int row) { return kSliceColumns == 64 ? (row & 7) : ((row >> 1) & 3); }

  // Byte offset of 16-byte chunk `chunk` (columns 8 * chunk ..) of `row`.
  static __device__ __forceinline__ int offset(int row, int chunk) {
    return (chunk / kSliceChunks) * kSliceBytes + row * kRowBytes + (((chunk % kSliceChunks) ^ swizzle(row)) << 4);
  }

  // Moves an address made by offset(row, chunk < 2) by `row` (a multiple of 8) and `chunk` (even, or any if the address
  // has chunk 0): cheap, because both are known at compile time but for a warp's number.
  static __device__ __forceinline__ uint32_t moved(uint32_t address, int row, int chunk) {
    return (address ^ ((chunk % kSliceChunks) << 4)) + (chunk / kSliceChunks) * kSliceBytes + row * kRowBytes;
  }

  // Lane addresses for ldmatrix at the tile's corner (add `moved`):
  // matrices in the order (rows 0-7, chunk 0), (rows 8-15, chunk 0), (0-7, 1), (8-15, 1): A operand, or a transposed B.
  static __device__ __forceinline__ uint32_t lanes_rows_first(uint32_t base, int lane) {
    return base + offset(lane & 15, lane >> 4);
  }
  // (rows 0-7, chunk 0), (0-7, 1), (8-15, 0), (8-15, 1): B operand, or a transposed A.
  static __device__ __forceinline__ uint32_t lanes_chunks_first(uint32_t base, int lane) {
    return base + offset((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
  }
};

// Copies of [rows, head_dim] slabs from global memory into a tile. A thread always serves the same chunk column, so its
// addresses are one base plus constants.
template <typename Tile, int kThreads>
struct TileCopy {
  static constexpr int kRowsPerPass = kThreads / Tile::kSliceChunks;
  static constexpr int kPasses = Tile::kRows / kRowsPerPass;
  static_assert(kThreads % Tile::kSliceChunks == 0 && Tile::kRows % kRowsPerPass == 0 && kRowsPerPass % 8 == 0);

  // Rows past `rows_valid` and columns past `columns_valid` (a multiple of 8) are filled with zeros.
  static __device__ __forceinline__ void load_async(uint32_t tile, const void* source, int64_t row_stride,
                                                    int rows_valid, int columns_valid, int thread) {
    const int chunk = thread % Tile::kSliceChunks;
    const int row = thread / Tile::kSliceChunks;
    const char* pointer = static_cast<const char*>(source) + (row * row_stride + chunk * 8) * 2;
    const int64_t pass_bytes = row_stride * (kRowsPerPass * 2);
    const uint32_t destination = tile + Tile::offset(row, chunk);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const bool row_valid = row + pass * kRowsPerPass < rows_valid;
#pragma unroll
      for (int slice = 0; slice < Tile::kSlices; ++slice) {
        const bool valid = row_valid && chunk * 8 + slice * Tile::kSliceColumns < columns_valid;
        copy_async_16(destination + pass * kRowsPerPass * Tile::kRowBytes + slice * Tile::kSliceBytes,
                      pointer + slice * Tile::kSliceColumns * 2, valid);
      }
      pointer += pass_bytes;
    }
  }

  // Flips the signs of what this thread's load_async brought.
  static __device__ __forceinline__ void negate(uint32_t tile, int thread) {
    const uint32_t origin = tile + Tile::offset(thread / Tile::kSliceChunks, thread % Tile::kSliceChunks);
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll 1
      for (int slice = 0; slice < Tile::kSlices; ++slice) {
        const uint32_t address = origin + pass * kRowsPerPass * Tile::kRowBytes + slice * Tile::kSliceBytes;
        const uint4 value = load_shared_128(address);
        constexpr uint32_t kSigns = 0x80008000u;
        store_shared_32(address, value.x ^ kSigns);
        store_shared_32(address + 4, value.y ^ kSigns);
        store_shared_32(address + 8, value.z ^ kSigns);
        store_shared_32(address + 12, value.w ^ kSigns);
      }
    }
  }
};

// Stores rows first_row .. first_row + kRowCount - 1 of a tile by kThreads threads. Row numbers are those of the tile,
// `target` is where its row 0 goes.
template <typename Tile, int kRowCount, int kThreads>
__device__ __forceinline__ void store_rows(uint32_t tile, int first_row, void* target, int64_t row_stride,
                                           int rows_valid, int columns_valid, int thread) {
  constexpr int kRowsPerPass = kThreads / Tile::kSliceChunks;
  static_assert(kThreads % Tile::kSliceChunks == 0 && kRowCount % kRowsPerPass == 0);
  const int chunk = thread % Tile::kSliceChunks;
#pragma unroll
  for (int pass = 0; pass < kRowCount / kRowsPerPass; ++pass) {
    const int row = first_row + pass * kRowsPerPass + thread / Tile::kSliceChunks;
    if (row < rows_valid) {
      char* pointer = static_cast<char*>(target) + (row * row_stride + chunk * 8) * 2;
#pragma unroll
      for (int slice = 0; slice < Tile::kSlices; ++slice) {
        if (chunk * 8 + slice * Tile::kSliceColumns < columns_valid) {
          *reinterpret_cast<uint4*>(pointer + slice * Tile::kSliceColumns * 2) =
              load_shared_128(tile + Tile::offset(row, chunk) + slice * Tile::kSliceBytes);
        }
      }
    }
  }
}

}  // namespace flashmask::sm80
