// Tiles of 16-bit values in shared memory as TMA writes and wgmma reads them.
//
// A tile of kRows x kColumns is cut into panels of kPanel columns: 64 (128 bytes a row) where that divides the columns,
// else 32 (64 bytes). Panels follow each other; inside one, rows follow each other, and the 16-byte chunks of a row are
// permuted by the row number (the hardware's 128- or 64-byte swizzle), so that eight rows of one chunk lie in
// different banks. Tiles start at multiples of 1,024 bytes, and sub-tiles at multiples of 8 rows.
#pragma once

#include <stdint.h>

#include "wgmma.cuh"

namespace flashmask::sm90 {

template <int kRows_, int kColumns_>
struct Panels {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kPanel = kColumns % 64 == 0 ? 64 : 32;
  static constexpr int kPanels = kColumns / kPanel;
  static constexpr int kRowBytes = kPanel * 2;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static_assert(kColumns % kPanel == 0 && kRows % 8 == 0);
  // Of a descriptor: kind of swizzle, and distance of neighbouring groups of eight rows in units of 16 bytes.
  static constexpr uint32_t kHighWord = (kPanel == 64 ? 1u : 2u) << 30 | 8 * kRowBytes / 16;

  // Byte offset of 16-byte chunk `chunk` (8 columns) of row `row`.
  static __device__ __forceinline__ int chunk_offset(int row, int chunk) {
    constexpr int kChunks = kPanel / 8;
    const int swizzled = kPanel == 64 ? (chunk % kChunks) ^ (row % 8) : (chunk % kChunks) ^ (row / 2 % 4);
    return chunk / kChunks * kPanelBytes + row * kRowBytes + swizzled * 16;
  }

  // The operand's K axis runs along the columns (K = head dim for Q K^T): k-step of 16 columns, rows from `row`.
  static __device__ __forceinline__ uint64_t along_columns(uint32_t base, int row, int column) {
    return descriptor(base + column / kPanel * kPanelBytes + row * kRowBytes + column % kPanel * 2, 1);
  }
  // The operand's K axis runs along the rows (K = keys for P V): k-step of 16 rows from `row`, columns from `column` (a
  // multiple of the panel). wgmma is told to transpose.
  static __device__ __forceinline__ uint64_t along_rows(uint32_t base, int row, int column) {
    return descriptor(base + column / kPanel * kPanelBytes + row * kRowBytes, kPanelBytes);
  }

  // What to add to a descriptor to move it along the columns, or by rows: addresses are in units of 16 bytes.
  static __device__ constexpr uint64_t column_distance(int column) {
    return (column / kPanel * kPanelBytes + column % kPanel * 2) / 16;
  }
  static __device__ constexpr uint64_t row_distance(int row) { return row * kRowBytes / 16; }
  // Only the low word of a descriptor holds the address; so it is one addition.
  static __device__ __forceinline__ uint64_t moved(uint64_t descriptor, uint64_t distance) {
    return descriptor_of(static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(distance),
                         static_cast<uint32_t>(descriptor >> 32));
  }

 private:
  // wgmma's matrix descriptor: address, distance of neighbouring panels (transposed operands only), distance of
  // neighbouring groups of eight rows, kind of swizzle; distances in units of 16 bytes.
  static __device__ __forceinline__ uint64_t descriptor(uint32_t address, int panel_distance) {
    const uint32_t distance = panel_distance == 1 ? 1 : panel_distance / 16;
    return descriptor_of(distance << 16 | (address & 0x3FFFF) >> 4, kHighWord);
  }
};

// Lane address for store_matrix of 16 rows x 16 columns (an operand of wgmma) at the corner (row, 0) of a tile of
// Panels; `row` is a multiple of 8. Further columns: matrix_moved.
template <typename Tile>
__device__ __forceinline__ uint32_t matrix_corner(uint32_t base, int row, int lane) {
  return base + Tile::chunk_offset(row + (lane & 15), lane >> 4);
}
template <typename Tile>
__device__ __forceinline__ uint32_t matrix_moved(uint32_t corner, int column) {
  return (corner ^ (column % Tile::kPanel * 2)) + column / Tile::kPanel * Tile::kPanelBytes;
}

}  // namespace flashmask::sm90
