// What a file of weights is when it is not what was expected, and what to do about it.
//
// People have weights in other forms than the released one: pointers that git left in the place of
// large files, GGUF, pickles, names with a prefix or of another library. Each is told apart by a
// few bytes or by its names, so that a message can say how to get the right file.
#pragma once

#include <filesystem>
#include <set>
#include <string>

namespace liveact {

// What a file is instead of `expected` ("safetensors", "torch", "json"), with what to do; empty
// where nothing is known that helps.
std::string other_form(const std::filesystem::path& path, const std::string& expected);

// ", but NAME, WHAT IT IS" for weights in a directory that may be meant for those called `stem`;
// empty where there are none.
std::string other_files(const std::filesystem::path& directory, const std::string& stem,
                        const std::string& expected);

// What is found instead of a tensor called `name`.
std::string other_names(const std::set<std::string>& found, const std::string& name);

}  // namespace liveact
