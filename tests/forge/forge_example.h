// A report as a forge run would fill it, with made-up numbers.
#pragma once
#include <cmath>

#include "forge/report.h"

namespace moru {

inline ForgeReport example_report() {
  ForgeReport r;
  r.title = "support";
  r.goal = "lower end of the 95 % interval ≥ 0.840";
  r.at_least = 0.84;
  r.machine_usd_per_hour = 0.10;
  r.outcome =
      "tuned Q4_K is chosen: the cheapest of 5 candidates that are good enough. It answers 0.888 "
      "of "
      "312 questions (95 % interval 0.848–0.918) at $0.00171 per 1,000 answers.";
  struct Row {
    const char* name;
    double mebibytes, bits;
    size_t correct;
    double tokens_per_second, usd;
  };
  const Row rows[] = {
      {"base", 93.8, 5.8, 31, 1890, 0.00188},
      {"tuned", 256.6, 16.0, 281, 640, 0.00521},
      {"tuned Q8_0", 136.5, 8.5, 281, 1640, 0.00207},
      {"tuned Q6_K", 106.0, 6.6, 280, 1750, 0.00194},
      {"tuned Q5_K", 92.1, 5.7, 279, 1880, 0.00181},
      {"tuned Q4_K", 79.9, 5.0, 277, 1990, 0.00171},
      {"tuned Q3_K", 68.3, 4.2, 251, 2010, 0.00169},
  };
  for (const Row& row : rows) {
    Candidate& c = r.candidates.emplace_back();
    c.name = row.name;
    c.file = "candidates/" + c.name + ".gguf";
    c.sha256 = "3f1c2a9be04d77185c6ad2f0917be3c8d5a4e6f70b1829364752819a0c3d4e5f";
    c.file_bytes = static_cast<uint64_t>(row.mebibytes * (1 << 20));
    c.bits_per_weight = row.bits;
    c.correct = row.correct;
    c.total = 312;
    c.interval = wilson(row.correct, 312);
    c.tokens_per_second = row.tokens_per_second;
    c.seconds = row.usd / 0.1 * 3600 * 0.312;
    c.usd_per_1000 = row.usd;
    c.good_enough = c.interval.low >= 0.84;
    c.verdict = c.good_enough
                    ? "good enough"
                    : "not good enough: lower end " + format_score(c.interval.low) + " < 0.840";
    if (c.name != "tuned")
      c.against_best = Candidate::AgainstBest{.newly_wrong = 281 - row.correct + 2,
                                              .newly_right = 2,
                                              .p = 0.34,
                                              .ratio = {0.968, 1.004}};
  }
  r.candidates[0].against_best->ratio.high = INFINITY;
  r.candidates[5].chosen = true;
  r.candidates[5].verdict = "chosen: the cheapest that is good enough";
  struct Price {
    const char* name;
    double usd;
  };
  for (const Price& price : {Price{"vendor large", 5.21}, Price{"vendor small", 0.0312},
                             Price{"vendor tiny", 0.0289}, Price{"한국어 API", 0.41}}) {
    Candidate& c = r.candidates.emplace_back();
    c.name = price.name;
    c.kind = Candidate::Kind::vendor;
    c.usd_per_1000 = price.usd;
    c.verdict = "list price, not measured";
    c.note = "list of 2026-08-21";
  }
  r.moru_version = "0.1.0";
  r.command =
      "moru forge --model smollm2-135m --pairs pairs.jsonl --questions questions.jsonl "
      "--at-least 0.84 --machine-price 0.10 --out forged/";
  r.machine = "AMD EPYC 9R14, 2 threads, avx512";
  r.started = "2026-01-31T09:30:00Z";
  r.finished = "2026-01-31T09:37:41Z";
  r.seed = 1;
  r.model = {"smollm2-135m.gguf",
             "a84f7e5c1b2d3e4f5061728394a5b6c7d8e9fa0b1c2d3e4f5061728394a5b6c7", 0};
  r.pairs = {"examples/support/pairs.jsonl",
             "b95f7e5c1b2d3e4f5061728394a5b6c7d8e9fa0b1c2d3e4f5061728394a5b6c7", 1248};
  r.questions = {"examples/support/questions.jsonl",
                 "c06f7e5c1b2d3e4f5061728394a5b6c7d8e9fa0b1c2d3e4f5061728394a5b6c7", 312};
  r.settings = {{"LoRA", "r 16, alpha 32, all linear layers"},
                {"learning rate", "1e-3, cosine, 3 % warm-up"},
                {"epochs", "at most 3, stopped early after 2.4"},
                {"answers", "greedy, at most 32 tokens, check exact"}};
  r.stages = {
      {"measure", 41, false}, {"tune", 262, false}, {"lighten", 58, false}, {"prove", 97, true}};
  for (size_t i = 0; i <= 60; ++i) {
    const double x = static_cast<double>(i);
    CurvePoint point{.step = i * 4,
                     .loss = 0.12 + 3.1 * std::exp(-x / 9) + 0.05 * std::sin(x * 1.7)};
    if (i % 15 == 0) point.validation_loss = 0.18 + 2.9 * std::exp(-x / 10);
    r.curve.push_back(point);
  }
  r.tried = {"LoRA r 16, lr 1e-3: validation loss 0.184 (kept)",
             "sizes Q8_0, Q6_K, Q5_K, Q4_K, Q3_K of the tuned model"};
  r.plan_log = {"blk.0.attn_k.weight: rows of 192 are not a multiple of 256, Q4_K → Q5_0",
                "blk.0.attn_v.weight: rows of 192 are not a multiple of 256, Q4_K → Q5_0"};
  r.changes = {{.title = "tuned Q4_K against tuned",
                .newly_wrong_total = 6,
                .newly_right_total = 2,
                .p = 0.289,
                .newly_wrong = {{"q17", "카드를 잃어버렸는데 앱에서 정지가 안 돼요 ㅠㅠ",
                                 "card_block", "card_block", "app_error"},
                                {"q203", "why was i charged twice for roaming last month??",
                                 "billing_dispute", "billing_dispute", "roaming_fee"}},
                .newly_right = {{"q88", "유심 다시 보내주실 수 있나요?", "sim_resend",
                                 "sim_activate", "sim_resend"}}}};
  return r;
}

}  // namespace moru
