// Few rows of a large vocabulary would leave threads idle: such rows are cut into pieces of columns, each computed as
// if it were a vocabulary shard, and merged. How many is a function of the shape alone, so that the bits of a result do
// not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "kernels/params.h"

namespace opd::ops {

struct Pieces {
  int64_t count, columns;  // pieces a row, columns a piece (the last may have fewer)
};

inline Pieces pieces_for_threads(const LogitsView& logits) {
  constexpr int64_t kRowsThatFillThreads = 16, kMinColumns = 16384, kGranularity = 1024;
  const int64_t rows = logits.num_rows;
  int64_t count = rows == 0 ? 1 : kRowsThatFillThreads / rows;
  if (count > logits.width / kMinColumns) count = logits.width / kMinColumns;
  if (count <= 1) return {1, logits.width};
  while ((count & (count - 1)) != 0) count &= count - 1;  // a power of two: as many pieces for each thread
  const int64_t columns = ((logits.width + count - 1) / count + kGranularity - 1) / kGranularity * kGranularity;
  return {(logits.width + columns - 1) / columns, columns};
}

inline int64_t item_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Columns [piece * columns, ...) of the view, as a shard of their own.
inline LogitsView piece_of(const LogitsView& logits, const Pieces& pieces, int64_t piece) {
  LogitsView part = logits;
  const int64_t start = piece * pieces.columns, left = logits.width - start, valid = logits.num_valid - start;
  part.data = static_cast<char*>(logits.data) + start * item_size(logits.dtype);
  part.width = left < pieces.columns ? left : pieces.columns;
  part.num_valid = valid < 0 ? 0 : valid < part.width ? valid : part.width;
  return part;
}

// Runs body(piece, begin, end, is_last) over all rows of all pieces on torch's intra-op pool; is_last: the last call of
// its thread, which else goes on with the next piece.
template <class Body>
void parallel_pieces(const LogitsView& logits, const Pieces& pieces, const Body& body) {
  const int64_t rows = logits.num_rows, columns = pieces.columns < 1 ? 1 : pieces.columns;
  if (rows == 0) return;
  const int64_t grain = columns >= 32768 || pieces.count > 1 ? 1 : 32768 / columns;  // about 32k columns a thread
  torch::stable::parallel_for(0, rows * pieces.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t piece = at / rows, row = at % rows, stop = row + (end - at) < rows ? row + (end - at) : rows;
      at += stop - row;
      body(piece, row, stop, at == end);
    }
  });
}

}  // namespace opd::ops
