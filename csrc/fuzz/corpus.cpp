// Runs the fuzzed readers without a fuzzer: every file of the corpus, then files that are damaged
// from it, the same ones each time.
//
//   fuzz_corpus FOLDER [DAMAGED]       DAMAGED: how many of those, 100000 unless given

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Bytes = std::vector<uint8_t>;

std::vector<Bytes> read_corpus(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file()) paths.push_back(entry.path());
  }
  std::sort(paths.begin(), paths.end());
  std::vector<Bytes> corpus;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return corpus;
}

// One to four changes: a byte overwritten, inserted or removed, a stretch copied from another file,
// the end cut off.
Bytes damaged(const std::vector<Bytes>& corpus, std::mt19937_64& random) {
  const auto below = [&](size_t n) {
    return static_cast<std::ptrdiff_t>(n == 0 ? 0 : random() % n);
  };
  Bytes bytes = corpus[below(corpus.size())];
  for (std::ptrdiff_t changes = 1 + below(4); changes > 0; --changes) {
    const std::ptrdiff_t at = below(bytes.size() + 1);
    switch (below(5)) {
      case 0:
        if (at < std::ssize(bytes)) bytes[at] = static_cast<uint8_t>(random());
        break;
      case 1:
        bytes.insert(bytes.begin() + at, "[{\"0\\,]}-e"[below(10)]);
        break;
      case 2:
        if (at < std::ssize(bytes)) bytes.erase(bytes.begin() + at);
        break;
      case 3: {
        const Bytes& other = corpus[below(corpus.size())];
        const std::ptrdiff_t begin = below(other.size());
        const std::ptrdiff_t count = std::min(below(32), std::ssize(other) - begin);
        bytes.insert(bytes.begin() + at, other.begin() + begin, other.begin() + begin + count);
        break;
      }
      default:
        bytes.resize(at);
    }
  }
  return bytes;
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<Bytes> corpus = read_corpus(count > 1 ? arguments[1] : ".");
  if (corpus.empty()) {
    std::fprintf(stderr, "fuzz_corpus: expected files in a folder, found none\n");
    return 2;
  }
  for (const Bytes& bytes : corpus) LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  const long inputs = count > 2 ? std::atol(arguments[2]) : 100'000;
  std::mt19937_64 random(42);
  for (long i = 0; i < inputs; ++i) {
    const Bytes bytes = damaged(corpus, random);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::printf("%zu files, %ld damaged ones: nothing found\n", corpus.size(), inputs);
  return 0;
}
