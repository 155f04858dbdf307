#include "prove/instructions.h"

#include <array>
#include <string>

#include "base/error.h"
#include "base/hash.h"

namespace moru {
namespace {

struct Instruction {
  const char* id;
  const char* prompt;
  const char* right;  // a pattern, or a JSON value
  Check check = Check::regex;
};

constexpr auto kInstructions = std::to_array<Instruction>({
    // ---- how much ----
    {"words-1", "What is the capital of France? Answer with exactly one word.", R"(^\s*\S+\s*$)"},
    {"words-3", "Describe the sea in exactly three words.", R"(^\s*(?:\S+\s+){2}\S+\s*$)"},
    {"words-5", "Write a slogan for a bakery. Use exactly five words.",
     R"(^\s*(?:\S+\s+){4}\S+\s*$)"},
    {"words-max-10", "Explain in at most ten words what a bicycle is.",
     R"(^\s*\S+(?:\s+\S+){0,9}\s*$)"},
    {"words-min-40", "Describe a busy railway station. Write at least 40 words.",
     R"(^\s*(?:\S+\s+){39,}\S+\s*$)"},
    {"one-sentence", "What does a librarian do? Answer in exactly one sentence.",
     R"(^[^.!?]+[.!?]\s*$)"},
    {"two-paragraphs",
     "Write about summer, then about winter: two short parts with a line that says only *** "
     "between "
     "them.",
     R"(^[^*]+\n\s*\*\*\*\s*\n[^*]+$)"},
    {"어절-1", "대한민국의 수도는 어디인가요? 한 단어로만 답하세요.", R"(^\s*\S+\s*$)"},
    {"어절-3", "바다를 정확히 세 단어로 표현해 주세요.", R"(^\s*(?:\S+\s+){2}\S+\s*$)"},
    {"문장-1", "도서관이 무엇인지 한 문장으로만 설명하세요.", R"(^[^.!?]+[.!?]?\s*$)"},
    {"글자-20", "비 오는 날을 공백을 포함해 20자 이내로 표현하세요.", R"(^\s*.{1,20}\s*$)"},
    // ---- letters ----
    {"upper", "Say good morning to your team. Write in capital letters only.",
     R"((?s)^(?=.*\p{Lu})[^\p{Ll}]+$)"},
    {"upper-list", "Name two fruits. Your whole answer must be in upper case.",
     R"((?s)^(?=.*\p{Lu})[^\p{Ll}]+$)"},
    {"lower", "Introduce yourself without a single capital letter.",
     R"((?s)^(?=.*\p{Ll})[^\p{Lu}]+$)"},
    {"no-comma", "List things that you find in a kitchen. Do not use any commas.", R"(^[^,]+$)"},
    {"no-e", "Name a colour whose name has no letter e. Answer with the colour only.",
     R"(^\s*[^eE\s]+\s*$)"},
    {"digits", "How many days has a week? Answer with digits only.", R"(^\s*\d+\s*$)"},
    {"숫자", "1년은 몇 개월인가요? 숫자만 쓰세요.", R"(^\s*\d+\s*$)"},
    {"쉼표-없이", "부엌에 있는 물건을 쉼표 없이 나열하세요.", R"(^[^,]+$)"},
    // ---- beginning and end ----
    {"begins", "Can you help me move on Sunday? Begin your answer with the word Certainly.",
     R"(^\s*Certainly\b)"},
    {"ends", "Give one tip for sleeping well. End your answer with the words: That is all.",
     R"(That is all\.?\s*$)"},
    {"ends-question", "Talk about the weather. The last character must be a question mark.",
     R"(\?\s*$)"},
    {"quoted", "Wish me luck. Put your whole answer in double quotation marks.",
     R"((?s)^\s*["“].*["”]\s*$)"},
    {"title", "Write two lines about rain, with a title in double angle brackets: <<title>>.",
     R"(<<[^<>\n]+>>)"},
    {"시작", "일요일 이사를 도와줄 수 있나요? '물론입니다'로 시작해서 답하세요.",
     R"(^\s*['"]?물론입니다)"},
    {"끝", "잠을 잘 자는 방법을 하나 알려 주세요. 답은 반드시 '이상입니다.'로 끝내세요.",
     R"(이상입니다\.?['"]?\s*$)"},
    {"물음표", "날씨 이야기를 해 주세요. 마지막 글자는 물음표여야 합니다.", R"(\?\s*$)"},
    // ---- words that must or must not stand there ----
    {"keyword", "Write one sentence about mountains that contains the word winter.",
     R"((?i)\bwinter\b)"},
    {"keyword-twice", "Write about a village. Use the word river at least twice.",
     R"((?is)\briver\b.*\briver\b)"},
    {"forbidden", "Describe the sun. Do not use the word hot.", R"((?is)^(?!.*\bhot\b).+$)"},
    {"낱말", "산에 대해 한 문장을 쓰되 '겨울'이라는 낱말을 꼭 넣으세요.", R"(겨울)"},
    {"금지어", "태양을 설명하되 '뜨겁'이라는 말을 쓰지 마세요.", R"((?s)^(?!.*뜨겁).+$)"},
    // ---- form ----
    {"bullets-3",
     "Give three reasons to walk. Write exactly three lines, each beginning with \"- \".",
     R"(^\s*(?:- [^\n]+\s*\n\s*){2}- [^\n]+\s*$)"},
    {"numbered-2", "Name two pets as a numbered list: 1. and 2., nothing else.",
     R"(^\s*1\. [^\n]+\s*\n\s*2\. [^\n]+\s*$)"},
    {"letter", "Which is an animal? (A) stone (B) horse (C) lamp. Answer with the letter only.",
     R"(^\s*\(?[ABC]\)?\.?\s*$)"},
    {"yes-no", "Is water wet? Answer only yes or no.", R"((?i)^\s*(?:yes|no)\.?\s*$)"},
    {"date", "Write the fifth of March 2024 as YYYY-MM-DD, nothing else.", R"(^\s*2024-03-05\s*$)"},
    {"목록-3", "걷기의 좋은 점 세 가지를 쓰세요. 정확히 세 줄, 각 줄은 \"- \"로 시작합니다.",
     R"(^\s*(?:- [^\n]+\s*\n\s*){2}- [^\n]+\s*$)"},
    {"예-아니요", "물은 젖어 있나요? '예' 또는 '아니요'로만 답하세요.",
     R"(^\s*['"]?(?:예|아니요)['"]?\.?\s*$)"},
    {"날짜", "2024년 3월 5일을 YYYY-MM-DD 형식으로만 쓰세요.", R"(^\s*2024-03-05\s*$)"},
    // ---- JSON ----
    {"json-object",
     "The city is Busan and the country is South Korea. Write this as JSON with the keys city and "
     "country.",
     R"({"city": "Busan", "country": "South Korea"})", Check::json},
    {"json-array", "Write the numbers 3, 5 and 8 as a JSON array.", "[3, 5, 8]", Check::json},
    {"json-flag", "Answer in JSON: an object whose only key is open, with the value true.",
     R"({"open": true})", Check::json},
    {"json-한국어", "이름은 민수, 나이는 30입니다. 키가 name과 age인 JSON으로 쓰세요.",
     R"({"name": "민수", "age": 30})", Check::json},
    // ---- language ----
    {"in-korean", "What is a tree? Answer in Korean only.", R"((?s)^(?=.*\p{Hangul})[^A-Za-z]+$)"},
    {"한국어로", "나무가 무엇인지 한국어로만 설명하세요.", R"((?s)^(?=.*\p{Hangul})[^A-Za-z]+$)"},
    {"영어로", "나무가 무엇인지 영어로만 설명하세요.", R"((?s)^(?=.*[A-Za-z])[^\p{Hangul}]+$)"},
    {"존댓말", "친구에게 늦는다고 알리는 한 문장을 '요'로 끝나는 존댓말로 쓰세요.",
     R"(요[.!~]*\s*$)"},
});

constexpr auto kPassages = std::to_array<std::string_view>({
    "A lighthouse keeper once had to climb the tower every few hours to wind the clockwork that "
    "turned the lamp. Today a small motor does the work, and most towers stand empty between two "
    "visits of the engineer.",
    "Bread rises because yeast eats sugar and gives off gas. The dough holds the bubbles as long "
    "as "
    "it is warm and moist, and the heat of the oven then makes their walls firm.",
    "The committee met on Tuesday to decide how the money should be spent. After two hours it had "
    "agreed on new windows for the school, but not on who would choose the builder.",
    "If the printer does not respond, first check that the cable is plugged in and the light is "
    "green. Then switch it off, wait for ten seconds, and switch it on again.",
    "Rivers carry sand and stones down from the mountains. Where the water slows, in a lake or at "
    "the sea, it drops what it carried, and over thousands of years new land grows there.",
    "She opened the letter at the kitchen table and read it twice. Nothing in it was new to her, "
    "and "
    "still she felt that something which had been open for a long time was now closed.",
    "A contract needs an offer, an acceptance, and something of value on both sides. It may be "
    "spoken, but a written one is easier to prove when the two sides remember it differently.",
    "To plant a tomato, bury the stem up to the first leaves. New roots will grow from it, and the "
    "plant will stand more firmly when the fruit becomes heavy in late summer.",
    "The train from the coast was late again, so the passengers waited on the platform and watched "
    "the rain. A boy counted the wagons of a goods train that went slowly by.",
    "Computers store a number as a row of ones and zeros. Adding two such rows works as on paper: "
    "from right to left, with a carry wherever both digits are one.",
    "In the north the days are long in June and short in December, because the axis of the Earth "
    "is "
    "tilted and each half of it leans towards the sun for part of the year.",
    "Good tools should be kept dry and sharp. A blunt knife needs more force, and force is what "
    "makes it slip; a sharp one goes where the hand leads it.",
    "우리 동네 도서관은 아침 아홉 시에 문을 연다. 평일에는 조용하지만 주말이 되면 아이들과 함께 "
    "온 가족들로 자리가 금세 찬다.",
    "김치는 배추를 소금에 절이는 일로 시작된다. 고춧가루와 마늘, 생강을 버무려 속을 채우고 "
    "서늘한 곳에 두면 며칠 뒤부터 맛이 들기 시작한다.",
    "지하철이 늦어지자 사람들은 휴대전화를 꺼내 회사에 연락했다. 안내 방송은 십 분쯤 뒤에 운행이 "
    "다시 시작될 것이라고 알렸다.",
    "비가 그친 뒤 산길은 미끄러웠다. 우리는 서두르지 않고 나무 사이로 비치는 햇빛을 따라 천천히 "
    "내려왔다.",
    "계약서를 쓸 때에는 금액과 날짜를 먼저 확인해야 한다. 말로 한 약속은 시간이 지나면 서로 다르게 "
    "기억하기 쉽다.",
    "바다와 가까운 마을에서는 바람의 방향을 보고 날씨를 짐작했다. 남쪽에서 불어오는 습한 바람은 곧 "
    "비가 온다는 뜻이었다.",
});

}  // namespace

QuestionSet instruction_questions() {
  QuestionSet set;
  set.where = "instructions";
  std::string asked;
  for (const Instruction& i : kInstructions) {
    const nlohmann::ordered_json row = {
        {"id", i.id}, {"prompt", i.prompt}, {"answer", i.right}, {"check", name_of(i.check)}};
    set.items.push_back(question_from_row(set.where, {.line = set.items.size() + 1, .value = row}));
    asked += row.dump() + '\n';
  }
  set.file_sha256 = set.asked_sha256 = sha256(asked);
  return set;
}

std::span<const std::string_view> general_passages() { return kPassages; }

}  // namespace moru
