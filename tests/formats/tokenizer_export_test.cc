#include "formats/tokenizer_export.h"

#include "formats/gguf.h"
#include "formats/tokenizer.h"
#include "peers.h"
#include "support.h"

using namespace moru;

TEST_CASE("a GGUF's tokenizer becomes a folder's with the same ids") {
  for (const char* name : {"SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-Q4_K_M.gguf"}) {
    const auto path = peer_model(name);
    if (!path) continue;
    CAPTURE(name);
    const GgufFile file(*path);
    const Tokenizer from = Tokenizer::from_gguf(file.metadata());
    const TokenizerFolder folder = tokenizer_folder_of(file.metadata());
    const TempDir dir;
    dir.file("tokenizer.json", folder.tokenizer.dump());
    dir.file("tokenizer_config.json", folder.config.dump());
    const Tokenizer to = Tokenizer::from_folder(dir.path());
    CHECK(to.vocab_size() == from.vocab_size());
    CHECK(to.bos() == from.bos());
    CHECK(to.eos() == from.eos());
    CHECK(to.adds_bos() == from.adds_bos());
    for (const char* text :
         {"Hello  world, 안녕하세요 세계! 12345", "<|im_start|>user\nhi<|im_end|>", "   a\n\n b",
          "<start_of_turn>user\nhi<end_of_turn>\n", "한글ㅋㅋ 👩‍👩‍👧"}) {
      CAPTURE(text);
      CHECK(to.encode(text) == from.encode(text));
      CHECK(to.decode(to.encode(text), true) == from.decode(from.encode(text), true));
    }
  }
}
