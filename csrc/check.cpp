#include "check.h"

#include <c10/util/Exception.h>

#include <array>
#include <map>
#include <mutex>
#include <sstream>
#include <string>

namespace ekfac_fast {
namespace {

struct Argument {
  std::string name;
  std::vector<std::string> shapes;  // alternatives, each a string of letters
  bool accumulates = false, operand = false;
};

// What a letter is bound to, and by which argument.
struct Letter {
  static constexpr int64_t kUnseen = -2;  // J - 1 of an empty side is -1
  int64_t size = kUnseen;
  size_t from = 0;
};

bool accumulates(const std::string& name) {
  return name == "cov" || name == "lam" || name == "lam_sum" || name == "s";
}

std::vector<Argument> parse(const std::string& line) {
  std::vector<Argument> parsed;
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    Argument argument{word.substr(0, word.find('[')), {}};
    bool inside = false;
    for (char c : word) {
      if (c == '[') {
        argument.shapes.emplace_back();
        inside = true;
      } else if (c == ']') {
        inside = false;
      } else if (inside && c != ',') {
        argument.shapes.back() += c;
      }
    }
    argument.accumulates = accumulates(argument.name);
    argument.operand = !argument.accumulates && argument.name != "mask";
    parsed.push_back(argument);
  }
  return parsed;
}

const std::vector<Argument>& parsed(const char* line) {
  static std::map<std::string, std::vector<Argument>> cache;
  static std::mutex guard;
  std::lock_guard<std::mutex> lock(guard);
  auto found = cache.find(line);
  return found != cache.end() ? found->second : cache.emplace(line, parse(line)).first->second;
}

std::string printed(const std::string& letters) {
  std::string text = "[";
  for (char c : letters) text += (text.size() > 1 ? "," : "") + std::string(1, c);
  return text + "]";
}

std::string printed(const std::vector<std::string>& alternatives) {
  std::string text;
  for (const auto& letters : alternatives) text += (text.empty() ? "" : " or ") + printed(letters);
  return text;
}

bool floating(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf ||
         dtype == at::kDouble;
}

// As Python prints it.
std::string printed(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return "torch.float32";
    case at::kDouble: return "torch.float64";
    case at::kBFloat16: return "torch.bfloat16";
    case at::kHalf: return "torch.float16";
    case at::kInt: return "torch.int32";
    case at::kLong: return "torch.int64";
    case at::kBool: return "torch.bool";
    default: return c10::toString(dtype);
  }
}

}  // namespace

Letters check(const char* op, const char* line, const Arguments& args, bool bias, double damping,
              const std::optional<c10::string_view>& order) {
  const auto& named = parsed(line);
  TORCH_INTERNAL_ASSERT(named.size() == args.size());
  // Texts are put together only where something is refused: they would take longer than small ops.
  std::array<Letter, 128> letters;
  const at::Tensor *first = nullptr, *operand = nullptr;
  size_t operand_index = 0;
  for (size_t i = 0; i < named.size(); i++) {
    TORCH_CHECK_VALUE(
        named[i].name != "Qa" || args[i] || !bias, op,
        ": bias=True but Qa is None. Activations already in the eigenbasis include the "
        "bias row of Qa: pass them with bias=False");
  }
  for (size_t i = 0; i < named.size(); i++) {
    if (!args[i]) continue;
    const at::Tensor& x = *args[i];
    const auto& [name, alternatives, sums, is_operand] = named[i];
    const std::string* shape = nullptr;
    for (const auto& alternative : alternatives) {
      if (static_cast<int64_t>(alternative.size()) == x.dim()) shape = &alternative;
    }
    TORCH_CHECK_VALUE(shape, op, ": ", name, " has shape ", x.sizes(), ", expected ",
                      printed(alternatives));
    for (size_t d = 0; d < shape->size(); d++) {
      const char letter = (*shape)[d];
      // I and J are one letter apart from the bias, so either may be seen first.
      Letter& bound = letters[letter == 'J' ? 'I' : letter];
      const int64_t value = x.size(d) - (letter == 'J' && bias);
      if (bound.size == Letter::kUnseen) bound = {value, i};
      TORCH_CHECK_VALUE(
          bound.size == value, op, ": ", name, " has shape ", x.sizes(), ", expected ",
          printed(*shape), " with ", letter, "=", bound.size + (letter == 'J' && bias), " (from ",
          named[bound.from].name, " ", args[bound.from]->sizes(),
          bias && (letter == 'I' || letter == 'J') ? ", J = I + 1 because bias=True" : "", ")");
    }
    if (!first) first = &x;
    TORCH_CHECK(x.device() == first->device(), op, ": ", name, " is on ", x.device(), " but ",
                named[0].name, " is on ", first->device(), "; move one");
    if (!is_operand) continue;
    TORCH_CHECK_TYPE(floating(x.scalar_type()), op, ": ", name, " is ", printed(x.scalar_type()),
                     ", expected float32, bfloat16, float16 or float64");
    if (!operand) {
      operand = &x;
      operand_index = i;
    }
    TORCH_CHECK_TYPE(x.scalar_type() == operand->scalar_type(), op, ": ", name, " is ",
                     printed(x.scalar_type()), " but ", named[operand_index].name, " is ",
                     printed(operand->scalar_type()), "; operands share one dtype");
  }
  const auto wide = operand->scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (size_t i = 0; i < named.size(); i++) {
    if (!args[i] || !named[i].accumulates) continue;
    TORCH_CHECK_TYPE(args[i]->scalar_type() == wide, op, ": ", named[i].name, " is ",
                     printed(args[i]->scalar_type()), ", expected ", printed(wide),
                     " (operands are ", printed(operand->scalar_type()), ")");
  }
  TORCH_CHECK_VALUE(damping >= 0, op, ": damping is ", damping, ", expected a number >= 0");
  TORCH_CHECK_VALUE(!order || *order == "tokens" || *order == "a_tokens" || *order == "g_tokens" ||
                        *order == "gradient",
                    op, ": order is '", *order,
                    "', expected one of tokens, a_tokens, g_tokens, gradient");
  auto size = [&](char letter, int64_t otherwise) {
    return letters[letter].size == Letter::kUnseen ? otherwise : letters[letter].size;
  };
  const int64_t I = size('I', 0);
  return {size('B', 1), size('T', 1), I,           I + bias, size('O', 0),
          size('Q', 0), size('K', 0), size('N', 0)};
}

Order contraction_order(const Letters& size, const std::optional<c10::string_view>& forced) {
  if (!forced) return {size.T < size.O, size.T < size.J};
  if (*forced == "tokens") return {true, true};
  if (*forced == "a_tokens") return {true, false};
  if (*forced == "g_tokens") return {false, true};
  return {false, false};
}

}  // namespace ekfac_fast
